"""Corruptions of pictures in five severities, after Hendrycks & Dietterich 2019 (ImageNet-C), for any size.

Every one is a function (uint8 [B, C, H, W], severity 1..5, generator) -> uint8 of the same shape.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

Corruption = Callable[[Tensor, int, Generator], Tensor]


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255


def _bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().byte()


def _normal(x: Tensor, g: Generator) -> Tensor:
    return torch.randn(x.shape, generator=g)


def _uniform(x: Tensor, g: Generator) -> Tensor:
    return torch.rand(x.shape, generator=g)


def gaussian_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Added noise of deviation 0.04 to 0.20."""
    return _bytes(_floats(x) + 0.04 * severity * _normal(x, g))


def shot_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Poisson noise: few photons."""
    photons = (250, 100, 50, 25, 12)[severity - 1]
    return _bytes(torch.poisson(_floats(x) * photons, generator=g) / photons)


def impulse_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    """2 to 10 % of the values are black or white."""
    u, share = _uniform(x, g), 0.02 * severity
    x = torch.where(u < share / 2, torch.zeros_like(x), x)
    return torch.where(u > 1 - share / 2, torch.full_like(x, 255), x)


def speckle_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Noise in proportion to the brightness."""
    y = _floats(x)
    return _bytes(y + y * 0.1 * severity * _normal(x, g))


def gaussian_blur(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Deviation of 1 to 5 % of the height."""
    sigma = 0.01 * severity * x.shape[2] + 0.2
    offsets = torch.arange(-int(3 * sigma + 1), int(3 * sigma + 1) + 1).float()
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return _bytes(_filtered(_filtered(_floats(x), kernel, 2), kernel, 3))


def motion_blur(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Smeared sideways over 5 to 25 % of the width."""
    half = 0.5 + 0.025 * severity * x.shape[3]
    offsets = torch.arange(-int(half + 1), int(half + 1) + 1).float()
    return _bytes(_filtered(_floats(x), (half + 0.5 - offsets.abs()).clamp(0, 1), 3))


def _filtered(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    half, channels = len(kernel) // 2, x.shape[1]
    pad = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
    shape = (channels, 1, -1, 1) if axis == 2 else (channels, 1, 1, -1)
    weight = (kernel / kernel.sum()).expand(channels, -1).reshape(shape)
    return F.conv2d(F.pad(x, pad, mode="replicate"), weight, groups=channels)


def pixelate(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Down to 80 ... 40 % of the pixels a side, and back."""
    size = [max(1, round(s * (0.9 - 0.1 * severity))) for s in x.shape[2:]]
    return _bytes(F.interpolate(F.interpolate(_floats(x), size, mode="area"), x.shape[2:], mode="nearest"))


def jpeg(x: Tensor, severity: int, g: Generator) -> Tensor:
    """JPEG of quality 50 to 8."""
    quality = (50, 35, 25, 15, 8)[severity - 1]
    return torch.stack([_through_jpeg(p, quality) for p in x])


def _through_jpeg(picture: Tensor, quality: int) -> Tensor:
    array = picture.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, format="JPEG", quality=quality)
    back = np.asarray(Image.open(file))
    return torch.from_numpy(back.reshape(array.shape).copy()).permute(2, 0, 1)


def brightness(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Brighter by 10 to 50 %."""
    return _bytes(_floats(x) + 0.1 * severity)


def contrast(x: Tensor, severity: int, g: Generator) -> Tensor:
    """85 to 25 % of the contrast."""
    y = _floats(x)
    mean = y.mean((2, 3), keepdim=True)
    return _bytes((y - mean) * (1 - 0.15 * severity) + mean)


def fog(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Laid over with smooth clouds."""
    clouds = sum(
        F.interpolate(torch.rand(len(x), 1, s, s, generator=g), x.shape[2:], mode="bilinear") / s for s in (2, 4)
    )
    weight = 0.12 * severity
    return _bytes(_floats(x) * (1 - weight) + weight * clouds / clouds.amax((2, 3), keepdim=True))


def occlusion(x: Tensor, severity: int, g: Generator) -> Tensor:
    """A grey square of 15 to 55 % of the side, somewhere."""
    h, w = x.shape[2:]
    side_h, side_w = (max(1, round(s * (0.05 + 0.1 * severity))) for s in (h, w))
    top = torch.randint(0, h - side_h + 1, (len(x), 1, 1, 1), generator=g)
    left = torch.randint(0, w - side_w + 1, (len(x), 1, 1, 1), generator=g)
    rows, columns = torch.arange(h).view(1, 1, -1, 1), torch.arange(w).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + side_h) & (columns >= left) & (columns < left + side_w)
    return torch.where(inside, torch.full_like(x, 128), x)


def rotation(x: Tensor, severity: int, g: Generator) -> Tensor:
    """Turned by 6 to 30 degrees, one way or the other."""
    sign = torch.randint(0, 2, (len(x),), generator=g) * 2.0 - 1
    angle = sign * severity * 6 * torch.pi / 180
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return _bytes(F.grid_sample(_floats(x), grid, padding_mode="border", align_corners=False))


CORRUPTIONS: dict[str, Corruption] = {
    f.__name__: f
    for f in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        motion_blur,
        pixelate,
        jpeg,
        brightness,
        contrast,
        fog,
        occlusion,
        rotation,
    )
}
