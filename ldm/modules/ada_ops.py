"""Moving pixels, differentiably twice: reflection at the borders, shifts, affine warps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.stylegan2_ops import downsample2d, upsample2d


def reflect(index: Tensor, size: int) -> Tensor:
    """Positions anywhere -> positions in [0, size - 1], mirrored at the first and the last pixel."""
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = torch.remainder(index, period)
    return torch.minimum(index, period - index)


def reflect_pad(x: Tensor, n: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H + 2n, W + 2n]; unlike `F.pad`, n may exceed the image."""
    for dim in (2, 3):
        index = torch.arange(-n, x.shape[dim] + n, device=x.device)
        x = x.index_select(dim, reflect(index, x.shape[dim]))
    return x


def shift(x: Tensor, t: Tensor, reflect_borders: bool) -> Tensor:
    """Each image [B, C, H, W] moved by t = (right, down), int64 [B, 2]; what comes in is mirrored, or zero."""
    for dim, move in ((3, t[:, 0]), (2, t[:, 1])):
        size = x.shape[dim]
        source = torch.arange(size, device=x.device) - move[:, None]  # [B, size]
        shape = [x.shape[0], 1, 1, size] if dim == 3 else [x.shape[0], 1, size, 1]
        index = reflect(source, size) if reflect_borders else source.clamp(0, size - 1)
        x = x.gather(dim, index.view(shape).expand_as(x))
        if not reflect_borders:
            x = x * (source == index).view(shape)
    return x


class _Sample(torch.autograd.Function):
    """Bilinear `grid_sample` that can be differentiated twice with respect to the image (PyTorch's cannot).

    It is linear in the image, so its backward pass is the transposed operation, and that one's is this again. The grid
    has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return torch.ops.aten.grid_sampler_2d(x, grid, 0, 0, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.shape), None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Sample`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        x = grad.new_empty(1).expand(shape)  # only its shape matters: the gradient of the grid is not asked for
        out = torch.ops.aten.grid_sampler_2d_backward(grad, x, grid, 0, 0, False, [True, False])
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(grad, ctx.saved_tensors[0]), None, None


def _mirror_far(at: Tensor, size: int, margin: float) -> Tensor:
    """`reflect` for what is further outside than the padding, which holds mirrored pixels itself, reaches."""
    return torch.where((at >= -margin) & (at <= size - 1 + margin), at, reflect(at, size))


def warp(x: Tensor, matrix: Tensor, f: Tensor) -> Tensor:
    """Affine warp of [B, C, H, W] between two resamplings by the orthogonal filter f, mirrored at the borders.

    Sampling happens at twice the resolution, so that little is blurred or aliased; the identity gives back the image.

    Args:
        matrix: [B, 3, 3], output pixels (x, y, 1) from the centre -> input pixels from the centre.
        f: taps of an orthogonal low-pass filter, sum 1, [taps].
    """
    b, _, h, w = x.shape
    border = f.shape[0] // 2  # pixels that the filters need around the image, at either resolution
    fine = upsample2d(reflect_pad(x, border), f)
    # f is not quite symmetric: what is at one place appears `delay` fine pixels further on, coming back as well
    delay = (f * (torch.arange(f.shape[0], device=f.device) - (f.shape[0] - 1) / 2)).sum()
    # centres of the fine output pixels, with the border that is cropped below, in pixels of the output
    px, py = ((torch.arange(-border, 2 * n + border, device=x.device) + 0.5 - delay) / 2 - n / 2 for n in (w, h))
    m = matrix.to(torch.float32)
    column = m[:, :2, :1] * px  # [B, 2, W']
    row = m[:, :2, 1:2] * py + m[:, :2, 2:]  # [B, 2, H']
    source = row[:, :, :, None] + column[:, :, None, :]  # [B, 2, H', W']
    source = [_mirror_far(source[:, i] + n / 2 - 0.5, n, border / 2) for i, n in enumerate((w, h))]
    # pixels of the input -> [-1, 1] over the padded fine image
    half = 0.5 + border + delay / 2
    grid = torch.stack([(s + half) / (n + 2 * border) * 2 - 1 for s, n in zip(source, (w, h), strict=True)], 3)
    sampled = _Sample.apply(fine, grid.to(fine.dtype))
    return downsample2d(sampled, f, padding=-border, flip_filter=True)
