"""Codebooks: a feature map of vectors -> the same map with every vector replaced by one of finitely many.

Every quantiser maps z [B, C, H, W] to (z_q, loss [], (perplexity | None, encodings | None, indices)) and back by
`get_codebook_entry(indices, shape)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
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


class EmbeddingEMA(nn.Module):
    """Codes and the running counts and sums that they are the ratio of (key names of taming-transformers)."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, n_e: int, e_dim: int) -> None:
        super().__init__()
        weight = torch.randn(n_e, e_dim)
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.ones(n_e))
        self.register_buffer("embed_avg", weight.clone())


class EMAVectorQuantizer(nn.Module):
    """Codes as running means of the vectors that chose them (van den Oord et al. 2017, appendix A.1).

    Args:
        n_e, e_dim: number and width of the codes.
        beta: weight of the commitment term, the only loss.
        decay: of the running counts and sums.
        eps: keeps empty codes from dividing by zero.
        restart: a code whose running count falls below this is put on a random vector of the batch (Dhariwal et al.
            2020, Jukebox, section 3.2); 0 never does. In units of vectors per batch.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        restart: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.decay, self.eps, self.restart = n_e, e_dim, beta, decay, eps, restart
        self.embedding = EmbeddingEMA(n_e, e_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Info]:
        """z [B, C, H, W] -> (z_q of that shape, loss [], (perplexity [], None, indices [B H W])).

        In training the codes move after they were read; not without gradients, so that a discriminator's turn over the
        same batch does not count twice.
        """
        B, C, H, W = z.shape
        pixels = z.permute(0, 2, 3, 1)
        flat = pixels.reshape(-1, C)
        indices = nearest_code(flat, self.embedding.weight)
        quant = self.embedding.weight[indices].view(B, H, W, C).to(z.dtype)
        counts = torch.zeros(self.n_e, device=z.device).index_add_(0, indices, torch.ones(len(flat), device=z.device))
        if self.training and torch.is_grad_enabled():
            self._update(flat.detach().float(), indices, counts.clone())
        loss = self.beta * ((quant - pixels) ** 2).mean()
        p = counts / counts.sum()
        perplexity = torch.exp(-(p * torch.log(p + 1e-10)).sum())
        return straight_through(pixels, quant).permute(0, 3, 1, 2), loss, (perplexity, None, indices)

    @torch.no_grad()
    def _update(self, flat: Tensor, indices: Tensor, counts: Tensor) -> None:
        e = self.embedding
        sums = torch.zeros_like(e.embed_avg).index_add_(0, indices, flat)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        e.cluster_size.lerp_(counts, 1 - self.decay)
        e.embed_avg.lerp_(sums, 1 - self.decay)
        total = e.cluster_size.sum()
        smoothed = (e.cluster_size + self.eps) / (total + self.n_e * self.eps) * total
        e.weight.copy_(e.embed_avg / smoothed[:, None])
        if self.restart > 0:
            dead = e.cluster_size < self.restart
            fresh = flat[torch.randint(len(flat), (self.n_e,), device=flat.device)]
            e.weight.copy_(torch.where(dead[:, None], fresh, e.weight))
            e.embed_avg.copy_(torch.where(dead[:, None], fresh * self.restart, e.embed_avg))
            e.cluster_size.copy_(torch.where(dead, self.restart, e.cluster_size))

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Indices and shape (B, H, W, C) -> codes [B, C, H, W]; without a shape [N, C]."""
        codes = self.embedding.weight[indices.reshape(-1)]
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)


class GumbelQuantize(nn.Module):
    """A softened choice of code that sharpens as its temperature falls (Jang et al. 2017; DALL-E's dVAE).

    Args:
        num_hiddens: channels of z.
        embedding_dim: width of the codes.
        n_embed: number of codes.
        straight_through: a hard choice in training too, with the gradient of the soft one.
        kl_weight: weight of KL(q(code | z), uniform).
        temp_init: temperature where a call gives none; recipes lower `temperature`.
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.n_embed = embedding_dim, n_embed
        self.straight_through, self.temperature, self.kl_weight = straight_through, temp_init, kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(self, z: Tensor, temp: float | None = None) -> tuple[Tensor, Tensor, Info]:
        """z [B, num_hiddens, H, W] -> (z_q [B, embedding_dim, H, W], loss [], (None, None, indices [B, H, W])).

        In evaluation the most probable code, without noise.
        """
        logits = self.proj(z).float()  # [B, n_embed, H, W]
        if self.training:
            hard, tau = self.straight_through, self.temperature if temp is None else temp
            choice = F.gumbel_softmax(logits, tau=tau, dim=1, hard=hard)
        else:
            choice = F.one_hot(logits.argmax(1), self.n_embed).movedim(-1, 1).to(logits.dtype)
        z_q = torch.einsum("bnhw,nd->bdhw", choice, self.embed.weight)
        q = logits.softmax(dim=1)
        loss = self.kl_weight * (q * torch.log(q * self.n_embed + 1e-10)).sum(dim=1).mean()
        return z_q, loss, (None, None, choice.argmax(dim=1))

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Indices and shape (B, H, W, C) -> codes [B, C, H, W]; without a shape [N, C]."""
        codes = self.embed(indices.reshape(-1))
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)


class FSQ(nn.Module):
    """Finite scalar quantisation: each number is rounded to one of a few values (Mentzer et al. 2023). No parameters.

    Args:
        levels: values per channel; 8, 5, 5, 5 makes 1,000 codes of width 4.
        n_e, e_dim: if given, they must be the product and the number of the levels.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int], n_e: int | None = None, e_dim: int | None = None) -> None:
        super().__init__()
        codes, width = math.prod(levels), len(levels)
        if n_e not in (None, codes) or e_dim not in (None, width):
            raise ValueError(f"levels: got {list(levels)}, {codes} codes of width {width}, expected {n_e} of {e_dim}")
        self.n_e, self.e_dim = codes, width
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("basis", basis, persistent=False)

    def _bound(self, z: Tensor) -> Tensor:
        """z [..., C] into (-L/2, L/2), so that rounding gives L values (the paper's appendix A)."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Info]:
        """z [B, C, H, W] -> (z_q of that shape in [-1, 1], loss [] = 0, (None, None, indices [B H W]))."""
        bounded = self._bound(z.permute(0, 2, 3, 1).float())
        rounded = straight_through(bounded, bounded.round())
        half = self.levels // 2
        indices = ((rounded.detach().round() + half).long() * self.basis).sum(-1)
        quant = (rounded / half).permute(0, 3, 1, 2).to(z.dtype)
        return quant, z.new_zeros(()), (None, None, indices.flatten())

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Indices and shape (B, H, W, C) -> codes [B, C, H, W]; without a shape [N, C]."""
        half = self.levels // 2
        codes = ((indices.reshape(-1, 1) // self.basis) % self.levels - half) / half
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)


class LookupFreeQuantizer(nn.Module):
    """Codes are corners of a cube, one bit a channel (Yu et al. 2023, MAGVIT-v2, section 3.1). No parameters.

    Args:
        n_e, e_dim: number of codes and channels; n_e must be 2^e_dim.
        beta: weight of the commitment term.
        entropy_weight: of the entropy terms: sure of each code (first), all codes in use (second).
        diversity: weight of the second entropy relative to the first.
        temperature: of the soft assignment behind the entropies.
    """

    codes: Tensor
    basis: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if n_e != 2**e_dim:
            raise ValueError(f"n_e: got {n_e}, expected 2^e_dim = {2**e_dim}")
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_weight, self.diversity, self.temperature = entropy_weight, diversity, temperature
        basis = 2 ** torch.arange(e_dim)
        self.register_buffer("basis", basis, persistent=False)
        bits = (torch.arange(n_e)[:, None] // basis) % 2
        self.register_buffer("codes", 2.0 * bits - 1.0, persistent=False)  # [n_e, e_dim]

    def entropies(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C] -> (mean entropy of an assignment, entropy of the mean assignment) in nats.

        |z - c|^2 is a constant minus 2 z c, so the logits are 2 z c / temperature, and the bits are independent: the
        first entropy is a sum of binary ones.
        """
        p = torch.sigmoid(4 * flat / self.temperature)
        each = F.binary_cross_entropy(p, p, reduction="none").sum(1).mean()
        mean = (2 * flat @ self.codes.t() / self.temperature).softmax(1).mean(0)
        return each, -(mean * torch.log(mean + 1e-10)).sum()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Info]:
        """z [B, C, H, W] -> (z_q of that shape, -1 or 1, loss [], (None, None, indices [B H W]))."""
        pixels = z.permute(0, 2, 3, 1)
        flat = pixels.reshape(-1, self.e_dim).float()
        quant = torch.where(pixels > 0, 1.0, -1.0).to(z.dtype)
        indices = ((flat > 0).long() * self.basis).sum(-1)
        loss = self.beta * ((quant - pixels) ** 2).mean()
        if self.training and self.entropy_weight > 0:
            with torch.autocast(z.device.type, enabled=False):
                each, mean = self.entropies(flat)
            loss = loss + self.entropy_weight * (each - self.diversity * mean)
        return straight_through(pixels, quant).permute(0, 3, 1, 2), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Indices and shape (B, H, W, C) -> codes [B, C, H, W]; without a shape [N, C]."""
        codes = self.codes[indices.reshape(-1)]
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)
