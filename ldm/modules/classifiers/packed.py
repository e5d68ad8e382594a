"""Convolutions on maps of a few pixels, with a weight gradient that fills the products of a processor.

oneDNN sums the gradient of a filter over the pixels of one row of one image at a time. Intel's AMX multiplies 32 of
them at once in bfloat16, so that a row of seven wastes three quarters of the work. Here the maps of several images lie
side by side in one long row, with the zeros of the padding between them: the same sum, in longer rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LONGEST = 8  # rows of more pixels gain nothing by it
ROW = 128  # pixels of a packed row at most
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
        return PackedGradient.apply(x.bfloat16(), self.weight.bfloat16())


class PackedGradient(torch.autograd.Function):
    """`F.conv2d(x, weight, padding="same")` for an odd kernel, whose weight gradient is taken of packed images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = backward(grad, x, weight, 0) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            gap = weight.shape[2] // 2
            images = together(x.shape, gap)
            for_weight = backward(packed(grad, images, gap), packed(x, images, gap), weight, 1)
        return for_x, for_weight


def backward(grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """The gradient of `F.conv2d(x, weight, padding="same")` to x (`which` 0) or to the weight (1)."""
    gap = [weight.shape[2] // 2] * 2
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], gap, [1, 1], False, [0, 0], 1, mask)[
        which
    ]


def together(shape: torch.Size, gap: int) -> int:
    """How many of the images [B, C, H, W] are put into one row: a divisor of B."""
    most = max(1, ROW // (shape[3] + gap))
    return max(n for n in range(1, most + 1) if shape[0] % n == 0)


def packed(x: Tensor, images: int, gap: int) -> Tensor:
    """[B, C, H, W] -> [B / images, C, H, images * (W + gap)]: images side by side with `gap` zeros after each."""
    batch, channels, height, width = x.shape
    rows = F.pad(x, (0, gap)).permute(0, 2, 3, 1).reshape(batch // images, images, height, width + gap, channels)
    return rows.transpose(1, 2).reshape(batch // images, height, images * (width + gap), channels).permute(0, 3, 1, 2)
