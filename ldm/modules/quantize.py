"""Codebooks: a feature map of vectors -> the same map with every vector replaced by one of finitely many.

Every quantiser maps z [B, C, H, W] to (z_q, loss [], (perplexity | None, encodings | None, indices)) and back by
`get_codebook_entry(indices, shape)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

Info = tuple[Tensor | None, Tensor | None, Tensor]


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: z [N, C], codebook [K, C] -> int64 [N], in float32 whatever the autocast.

    |z - e|^2 without the |z|^2 that all codes share.
    """
    with torch.autocast(z.device.type, enabled=False):
        e = codebook.float()
        return torch.addmm((e**2).sum(1), z.float(), e.t(), alpha=-2).argmin(dim=1)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q, the gradient of z (Bengio et al. 2013)."""
    return z + (z_q - z).detach()


class VectorQuantizer2(nn.Module):
    """Nearest code with a straight-through gradient (van den Oord et al. 2017, equation 3), as in VQGAN.

    Args:
        n_e: number of codes.
        e_dim: channels of z and of the codes.
        beta: weight of the commitment term.
        remap: .npy file of used indices; all others become `unknown_index`.
        unknown_index: random | extra (one further index) | an integer.
        sane_index_shape: indices come as [B, H, W] instead of [B H W] ([B H W, 1] with remap).
        legacy: the official slip, kept for its checkpoints: beta weighs the codebook's term, not the commitment.
    """

    used: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape, self.remap = sane_index_shape, remap
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.re_embed, self.unknown_index = n_e, unknown_index
        if remap is not None:
            if unknown_index not in ("random", "extra") and not isinstance(unknown_index, int):
                raise ValueError(f"unknown_index: got {unknown_index!r}, expected random, extra or an integer")
            self.register_buffer("used", torch.tensor(np.load(remap)))
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codebook indices [B, ...] -> positions in the list of used codes, of the same shape."""
        match = inds.unsqueeze(-1) == self.used.to(inds)
        known, new = match.any(-1), match.long().argmax(-1)
        if self.unknown_index == "random":
            return torch.where(known, new, torch.randint_like(new, self.re_embed))
        return new.masked_fill(~known, int(self.unknown_index))

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions in the list of used codes -> codebook indices; the extra index becomes the first used code."""
        if self.re_embed > len(self.used):
            inds = inds.masked_fill(inds >= len(self.used), 0)
        return self.used.to(inds.device)[inds]

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, Info]:
        """z [B, C, H, W] -> (z_q of that shape, loss [], (None, None, indices)).

        Raises:
            ValueError: an option of the Gumbel quantiser was asked for.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2: got temp, rescale_logits or return_logits, expected none of them")
        B, C, H, W = z.shape
        pixels = z.permute(0, 2, 3, 1)  # [B, H, W, C]
        indices = nearest_code(pixels.reshape(-1, C), self.embedding.weight)
        quant = self.embedding(indices).view(B, H, W, C)
        to_codes, to_encoder = ((quant - pixels.detach()) ** 2).mean(), ((quant.detach() - pixels) ** 2).mean()
        loss = to_encoder + self.beta * to_codes if self.legacy else self.beta * to_encoder + to_codes
        quant = straight_through(pixels, quant).permute(0, 3, 1, 2)  # [B, C, H, W], channels-last in memory
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(B, -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(B, H, W)
        return quant, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Indices and shape (B, H, W, C) -> codes [B, C, H, W]; without a shape [N, C]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes = self.embedding(indices.reshape(-1))
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)
