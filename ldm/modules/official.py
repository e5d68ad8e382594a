"""Functions of the official `ldm.modules.diffusionmodules.util` whose signature differs from ours."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """func(*inputs); with `flag` its activations are computed again in the backward pass instead of held.

    `params`, which the original had to be told, are found by themselves.
    """
    return torch_checkpoint(func, *inputs, use_reentrant=False) if flag else func(*inputs)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiplies every parameter by `scale`, in place."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module
