"""Encoders and decoders of a VAE whose latent is one vector per image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Size = int | Sequence[int]


def _sides(size: Size, levels: int) -> tuple[int, int]:
    """(height, width) of the smallest feature map after levels - 1 halvings."""
    h, w = (size, size) if isinstance(size, int) else size
    factor = 2 ** (levels - 1)
    if h % factor or w % factor:
        raise ValueError(f"size: got {h}x{w}, expected multiples of {factor} ({levels} levels in ch_mult)")
    return h // factor, w // factor


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut; the second convolution starts at 0."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(math.gcd(8, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class ConvEncoder(nn.Module):
    """[B, channels, H, W] -> [B, out_dim], residual blocks with a halving of the sides between levels.

    Args:
        size: side, or [height, width], of the images.
        channels: of the images.
        out_dim: numbers per image.
        ch: width of the first level.
        ch_mult: width of each level as a multiple of `ch`.
        num_res_blocks: blocks per level.
        dropout: inside the blocks.
    """

    def __init__(
        self,
        size: Size,
        channels: int,
        out_dim: int,
        ch: int = 32,
        ch_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        h, w = _sides(size, len(ch_mult))
        layers: list[nn.Module] = [nn.Conv2d(channels, ch, 3, padding=1)]
        width = ch
        for i, mult in enumerate(ch_mult):
            if i > 0:
                layers.append(nn.AvgPool2d(2))
            for _ in range(num_res_blocks):
                layers.append(Block(width, ch * mult, dropout))
                width = ch * mult
        layers += [nn.GroupNorm(math.gcd(8, width), width), nn.SiLU(), nn.Flatten(), nn.Linear(width * h * w, out_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvDecoder(nn.Module):
    """[B, latent_dim] -> [B, channels, H, W], the mirror image of `ConvEncoder`.

    Args: as for `ConvEncoder`, and
        latent_dim: numbers per image.
    """

    def __init__(
        self,
        size: Size,
        channels: int,
        latent_dim: int,
        ch: int = 32,
        ch_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        h, w = _sides(size, len(ch_mult))
        width = ch * ch_mult[-1]
        layers: list[nn.Module] = [nn.Linear(latent_dim, width * h * w), nn.Unflatten(1, (width, h, w))]
        for i, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks):
                layers.append(Block(width, ch * mult, dropout))
                width = ch * mult
            if i > 0:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        layers += [nn.GroupNorm(math.gcd(8, width), width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def _mlp(widths: Sequence[int], dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(i, o), nn.SiLU(), nn.Dropout(dropout)]
    return layers[:-2]  # the last layer is linear


class MLPEncoder(nn.Module):
    """[B, channels, H, W] -> [B, out_dim], fully connected (Kingma & Welling 2014, appendix C).

    Args:
        size: side, or [height, width], of the images.
        channels: of the images.
        out_dim: numbers per image.
        hidden: widths of the hidden layers.
        dropout: after each hidden layer.
    """

    def __init__(
        self, size: Size, channels: int, out_dim: int, hidden: Sequence[int] = (512, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        h, w = _sides(size, 1)
        self.layers = nn.Sequential(nn.Flatten(), *_mlp([channels * h * w, *hidden, out_dim], dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MLPDecoder(nn.Module):
    """[B, latent_dim] -> [B, channels, H, W], fully connected.

    Args: as for `MLPEncoder`, and
        latent_dim: numbers per image.
    """

    def __init__(
        self, size: Size, channels: int, latent_dim: int, hidden: Sequence[int] = (256, 512), dropout: float = 0.0
    ) -> None:
        super().__init__()
        h, w = _sides(size, 1)
        layers = _mlp([latent_dim, *hidden, channels * h * w], dropout)
        self.layers = nn.Sequential(*layers, nn.Unflatten(1, (channels, h, w)))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
