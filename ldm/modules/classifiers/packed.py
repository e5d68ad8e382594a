"""Convolutions on maps of a few pixels that fill the products of a processor.

oneDNN takes the pixels of one row of one image at a time. Intel's AMX multiplies 16 of them at once in bfloat16, and 32
in the gradient of a filter, so that a row of seven wastes more than half of the work. Here the maps of several images
lie side by side in one long row, with the zeros of the padding between them: the same sums, in longer rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LONGEST = 8  # rows of more pixels gain nothing by it
ROW = 32  # pixels of a packed row at most, or
TINY, TINY_ROW = 4, 80  # this many for rows of this size and less
AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # bool() is False: an older PyTorch does not say


class PackedConv2d(nn.Conv2d):
    """`nn.Conv2d` of stride 1 that keeps the size, without a bias; faster in training on small maps with AMX.

    Args:
        in_channels: of the input.
        channels: of the output.
        kernel_size: odd.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, H, W]."""
        in_bfloat16 = x.device.type == "cpu" and torch.get_autocast_dtype("cpu") is torch.bfloat16
        on = AMX and in_bfloat16 and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if not on or self.bias is not None or x.shape[3] > LONGEST or torch.compiler.is_compiling():
            return super().forward(x)
        if together(x.shape, self.kernel_size[0] // 2) == 1:  # a batch that no small number divides
            return super().forward(x)
        return Packed.apply(x.bfloat16(), self.weight.bfloat16())


class Packed(torch.autograd.Function):
    """`F.conv2d(x, weight, padding="same")` for an odd kernel, of packed images in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.gap, ctx.shape = weight.shape[2] // 2, x.shape
        ctx.images = together(x.shape, ctx.gap)
        x = packed(x, ctx.images, ctx.gap)
        ctx.save_for_backward(x, weight)
        return unpacked(F.conv2d(x, weight, padding=ctx.gap), ctx.images, ctx.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        mask = [*ctx.needs_input_grad, False]
        grad, gap = packed(grad, ctx.images, ctx.gap), [ctx.gap, ctx.gap]
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], gap, [1, 1], False, [0, 0], 1, mask
        )
        return unpacked(for_x, ctx.images, ctx.shape[3]) if mask[0] else None, for_weight


def together(shape: torch.Size, gap: int) -> int:
    """How many of the images [B, C, H, W] are put into one row: a divisor of B."""
    most = max(1, (TINY_ROW if shape[3] <= TINY else ROW) // (shape[3] + gap))
    return max(n for n in range(1, most + 1) if shape[0] % n == 0)


def packed(x: Tensor, images: int, gap: int) -> Tensor:
    """[B, C, H, W] -> [B / images, C, H, images * (W + gap)]: images side by side with `gap` zeros after each."""
    batch, channels, height, width = x.shape
    out = x.new_zeros(batch // images, height, images, width + gap, channels)
    out[:, :, :, :width] = x.permute(0, 2, 3, 1).reshape(-1, images, height, width, channels).transpose(1, 2)
    return out.flatten(2, 3).permute(0, 3, 1, 2)


def unpacked(x: Tensor, images: int, width: int) -> Tensor:
    """The inverse of `packed`: [B / images, C, H, images * (W + gap)] -> [B, C, H, W], without the gaps."""
    rows = x.permute(0, 2, 3, 1).unflatten(2, (images, -1))[:, :, :, :width].transpose(1, 2)
    return rows.reshape(-1, *rows.shape[2:]).permute(0, 3, 1, 2)
