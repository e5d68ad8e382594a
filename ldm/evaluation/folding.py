"""A network for measuring: batch norms folded into the convolutions before them, which saves passes over features."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

CLOSE = 1e-4  # of the largest output: a network that folding changes by more is left as it was


@torch.no_grad()
def folded(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy in evaluation mode that gives the same, faster: batch norms folded (Jacob et al. 2018, section 3.2).

    Which batch norm reads which convolution is seen in a forward pass, so that it does not matter how the network is
    written; where the copy then gives something else (a convolution whose output is read elsewhere, too), nothing is
    folded. Layers of the copy have the names that they had.

    Args:
        network: of any kind; one without batch norms comes back as a copy.
        x: a small batch for it, [B, C, H, W].
    """
    plain = copy.deepcopy(network).eval()
    result = copy.deepcopy(plain)
    for conv, norm in _pairs(result, x):
        layers = dict(result.named_modules())
        result.set_submodule(conv, nn.utils.fuse_conv_bn_eval(layers[conv], layers[norm]))
        result.set_submodule(norm, nn.Identity())
    wanted, got = plain(x), result(x)
    same = torch.allclose(got, wanted, rtol=0, atol=CLOSE * float(wanted.abs().max()))
    return (result if same else plain).to(memory_format=torch.channels_last)


def _pairs(network: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions whose output a batch norm reads, with that batch norm; each is called once."""
    names = {module: name for name, module in network.named_modules()}
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other gets their id
    calls: list[str] = []
    pairs: list[tuple[str, str]] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(names[module])
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (names[module], output)
        elif id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], names[module]))

    hooks = [m.register_forward_hook(see) for m in names if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    network(x)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)]
