"""Conditions that are tokens already, or become tokens without a codebook (Esser et al. 2021, section 3.3).

Each answers `encode(c) -> (quant, None, (None, None, indices [B, ...]))`, as a VQ model does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoded = tuple[Tensor, None, tuple[None, None, Tensor]]


class CoordStage(nn.Module):
    """Places of pixels in the uncut picture, as one token per patch.

    Args:
        n_embed: tokens.
        down_factor: side of a patch in pixels.
    """

    def __init__(self, n_embed: int, down_factor: int) -> None:
        super().__init__()
        self.n_embed, self.down_factor = n_embed, down_factor

    def encode(self, c: Tensor) -> Encoded:
        """Places [B, 1, H, W] in [0, 1] -> (rounded n_embed * c, None, (None, None, int64 [B, 1, h, w])).

        Raises:
            ValueError: not one channel.
        """
        if c.ndim != 4 or c.shape[1] != 1:
            raise ValueError(f"coord: got {tuple(c.shape)}, expected [B, 1, H, W]")
        c = F.interpolate(c, scale_factor=1 / self.down_factor, mode="area").clamp(0, 1)
        quant = (self.n_embed * c).round()
        return quant, None, (None, None, quant.long().clamp_max(self.n_embed - 1))

    def decode(self, c: Tensor) -> Tensor:
        """Tokens [B, 1, h, w] -> places [B, 1, H, W] in [0, 1]."""
        return F.interpolate(c / self.n_embed, scale_factor=float(self.down_factor), mode="nearest")


class DummyCondStage(nn.Module):
    """Tokens that the data set has made.

    Args:
        conditional_key: batch key of the tokens.
    """

    def __init__(self, conditional_key: str) -> None:
        super().__init__()
        self.conditional_key = conditional_key

    def encode(self, c: Tensor) -> Encoded:
        """int64 [B, n] as it is."""
        return c, None, (None, None, c)

    def decode(self, c: Tensor) -> Tensor:
        return c


class SOSProvider(nn.Module):
    """The start token alone, for models without a condition.

    Args:
        sos_token: the token.
    """

    def __init__(self, sos_token: int) -> None:
        super().__init__()
        self.sos_token = sos_token

    def encode(self, x: Any) -> Encoded:
        """Anything with B rows -> tokens [B, 1]."""
        c = torch.full((len(x), 1), self.sos_token, dtype=torch.int64, device=getattr(x, "device", None))
        return c, None, (None, None, c)


class Labelator(nn.Module):
    """Classes as they are: one token.

    Args:
        n_classes: tokens.
        quantize_interface: answer as a VQ model does; else the tokens alone.
    """

    def __init__(self, n_classes: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.n_embed, self.quantize_interface = n_classes, quantize_interface

    def encode(self, c: Tensor) -> Encoded | Tensor:
        """Classes int64 [B] -> tokens [B, 1].

        Raises:
            ValueError: a class outside 0 .. n_classes - 1.
        """
        if len(c) and (int(c.min()) < 0 or int(c.max()) >= self.n_embed):
            raise ValueError(f"classes: got {int(c.min())} to {int(c.max())}, expected 0 to {self.n_embed - 1}")
        tokens = c.long()[:, None]
        return (tokens, None, (None, None, tokens)) if self.quantize_interface else tokens


class Identity(nn.Module):
    """Image tokens in raster order. Other orders are modules with the same call."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Tokens [B, n] -> the order that the transformer reads them in, or back."""
        return x
