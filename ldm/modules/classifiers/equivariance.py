"""How far the feature maps of a convolutional network move with the picture: f(shift x) against shift f(x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError


@torch.no_grad()
def maps_by_stride(net: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Pictures [B, C, H, W] -> for each stride of the network the last feature map that has it, [B, C', H/s, W/s].

    Raises:
        UserError: a network without feature maps (a Vision Transformer works on rows of tokens).
    """
    found: dict[int, Tensor] = {}

    def see(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:
            stride, rest = divmod(x.shape[2], output.shape[2])
            if not rest:
                found[stride] = output

    hooks = [m.register_forward_hook(see) for m in net.modules()]
    net.eval()(x)
    for hook in hooks:
        hook.remove()
    if len(found) < 2:
        raise UserError(
            f"{type(net).__name__} has no feature maps of several strides: expected a convolutional network"
        )
    return dict(sorted(found.items()))


def shift_errors(net: nn.Module, x: Tensor, largest: int = 8) -> dict[int, list[float]]:
    """For each stride, and shifts of the pictures by 0, 1, ... `largest` pixels along both axes, the part of the map
    that no shift of the map explains: min over k of |f(shift x) - shift_k f(x)| / |f(x) - mean f(x)|, 0 to about 1.4.

    Pictures are continued by their border to eight times their size and only the middle of the maps counts, so that
    what zero padding does at the edges is out of the receptive field of all but very deep networks.

    Args:
        net: a network that takes pictures of any size.
        x: [B, C, H, W] in the network's range.
    """
    room = [7 * x.shape[3] // 2] * 2 + [7 * x.shape[2] // 2] * 2
    wide = F.pad(x, room, mode="replicate")
    here = maps_by_stride(net, wide)
    errors: dict[int, list[float]] = {stride: [] for stride in here}
    for pixels in range(largest + 1):
        there = maps_by_stride(net, torch.roll(wide, (pixels, pixels), (2, 3)))
        for stride, still in here.items():
            inner = slice(3 * still.shape[2] // 8, 5 * still.shape[2] // 8)
            scale = (still - still.mean((2, 3), keepdim=True))[..., inner, inner].norm()
            moved = (torch.roll(still, (k, k), (2, 3)) for k in {pixels // stride, -(-pixels // stride)})
            best = min(float((there[stride] - m)[..., inner, inner].norm() / scale) for m in moved)
            errors[stride].append(best)
    return errors
