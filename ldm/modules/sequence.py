"""Where the image lies in a sequence of tokens: places of the tokens, rotary angles, who sees whom."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("full", "row", "column", "conv")


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` tokens, of which `height * width` from `start` on are an image in raster order.

    Raises:
        ValueError: the image does not fit into the sequence.
    """

    length: int
    start: int = 0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.start + self.area > self.length:
            raise ValueError(
                f"sequence: got an image of {self.height}x{self.width} tokens from place {self.start} on, expected it "
                f"to end within {self.length} tokens (block_size)"
            )

    @property
    def area(self) -> int:
        """Tokens of the image."""
        return self.height * self.width

    def moved(self, start: int) -> Layout:
        """The same with the image elsewhere."""
        return self if start == self.start else replace(self, start=start)

    @staticmethod
    def check_kind(kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"attention: got {kind!r}, expected one of {', '.join(KINDS)}")

    def places(self) -> Tensor:
        """int64 [length, 3]: number among the tokens outside the image (-1 within), row, column (0 outside)."""
        i = torch.arange(self.length)
        at = i - self.start
        inside = (at >= 0) & (at < self.area)
        outside = torch.where(inside, -1, torch.where(at < 0, i, i - self.area))
        width = max(1, self.width)
        zero = torch.zeros_like(at)
        return torch.stack([outside, torch.where(inside, at // width, zero), torch.where(inside, at % width, zero)], 1)

    def angles(self, head: int, base: float = 10000.0) -> Tensor:
        """float64 [length, head / 2]: angles of rotary positions for heads of that width.

        Without an image the token's number turns all pairs. With one, half of the pairs turn by the row and half by the
        column; a token outside stands on the diagonal, so that rows and columns go on where the text ends.
        """
        outside, row, column = self.places().unbind(1)
        behind = torch.where(outside >= self.start, max(self.height, self.width), 0)
        along = outside + behind
        pairs = head // 2 if not self.area else head // 4
        frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        if not self.area:
            return along[:, None] * frequencies
        axes = [torch.where(outside < 0, self.start + axis, along) for axis in (row, column)]
        return torch.cat([axis[:, None] * frequencies for axis in axes], 1)

    def mask(self, kind: str, kernel_size: int = 11, n_unmasked: int = 0) -> Tensor:
        """bool [length, length]: may token i (row) see token j (column)?

        Every token sees those before it and itself. In sparse kinds, tokens of the image see of the image only those in
        their row, in their column, or in the window of `kernel_size` around them.
        """
        self.check_kind(kind)
        mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        if n_unmasked:
            mask[:n_unmasked, :n_unmasked] = True
        if kind == "full" or not self.area:
            return mask
        outside, row, column = self.places().unbind(1)
        rows, columns = (row[:, None] - row).abs(), (column[:, None] - column).abs()
        half = kernel_size // 2
        near = {"row": rows == 0, "column": columns == 0, "conv": (rows <= half) & (columns <= half)}[kind]
        both = (outside[:, None] < 0) & (outside < 0)
        return mask & (near | ~both)
