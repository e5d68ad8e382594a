"""A codebook that needs no training; the trained ones are in `ldm.modules.quantize`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelCodes(nn.Module):
    """Pixels as tokens, each channel rounded to a few levels (Chen et al. 2020, Image GPT, has a trained palette).

    It answers as a VQ model does, for small pictures that need no first stage.

    Args:
        size: side, or [height, width], of the pictures.
        channels: of the pictures.
        levels: per channel; there are levels^channels tokens.

    Raises:
        ValueError: fewer than two levels.
    """

    def __init__(self, size: int | Sequence[int], channels: int = 1, levels: int = 16) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels: got {levels}, expected at least 2")
        self.grid = (size, size) if isinstance(size, int) else tuple(size)
        self.channels, self.levels, self.n_embed = channels, levels, levels**channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """[B, C, H, W] in [-1, 1] -> (rounded pictures, loss [] = 0, (None, None, tokens int64 [B, H, W])).

        Raises:
            ValueError: another number of channels.
        """
        if x.shape[1] != self.channels:
            raise ValueError(f"got {x.shape[1]} channels, expected {self.channels}")
        steps = ((x.clamp(-1, 1) + 1) * ((self.levels - 1) / 2)).round().long()
        basis = self.levels ** torch.arange(self.channels, device=x.device)
        codes = (steps * basis[:, None, None]).sum(1)
        return self.decode_code(codes).to(x.dtype), x.new_zeros(()), (None, None, codes)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Tokens [B, H, W] -> pictures [B, C, H, W] in [-1, 1]."""
        basis = self.levels ** torch.arange(self.channels, device=code_b.device)
        steps = (code_b[:, None] // basis[:, None, None]) % self.levels
        return steps * (2 / (self.levels - 1)) - 1
