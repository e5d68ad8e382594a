"""The Transformer ("Attention Is All You Need", Vaswani et al. 2017): encoder, decoder, both, and positions.

Key names are those of `torch.nn.MultiheadAttention`, `TransformerEncoderLayer`, `TransformerDecoderLayer` and
`Transformer`, so that weights of either fit the other. Sequences are [B, L, D]; masks are boolean, True = may be
attended to (torch.nn's masks say the opposite).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.sdpa import attention

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in several heads (section 3.2).

    Args:
        dim: of the sequences.
        heads: must divide `dim`.
        dropout: of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"got dim={dim} and heads={heads}, expected heads that divide dim")
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of the context (None: of x), each [B, heads, L, dim / heads]."""
        w, b = self.in_proj_weight, self.in_proj_bias
        if context is None:
            q, k, v = F.linear(x, w, b).chunk(3, -1)
        else:
            dim = x.shape[-1]
            q = F.linear(x, w[:dim], b[:dim])
            k, v = F.linear(context, w[dim:], b[dim:]).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """[B, L, dim] -> [B, L, dim].

        Args:
            x: the queries' sequence.
            context: what is attended to, [B, M, dim]; None: x itself.
            mask: bool [L, M] (`causal_mask`), [B, 1, 1, M] (`key_mask`), or what broadcasts to [B, heads, L, M].
            causal: position i sees positions 0 to i only; not together with a mask.
        """
        if mask is not None and causal:
            raise ValueError("got a mask and causal=True, expected one of them (causal_mask(L) & mask is both)")
        q, k, v = self.project(x, context)
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask, dropout, causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Attention of x to itself, [B, heads, L, L], rows summing to one: for pictures."""
        q, k, _ = self.project(x)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """[length, length], True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def key_mask(keep: Tensor) -> Tensor:
    """bool [B, M], False for padding -> the mask [B, 1, 1, M]."""
    return keep[:, None, None, :]


class _Layer(nn.Module):
    """What encoder and decoder layers share: where the norms are, and the feed-forward part (section 3.3)."""

    def __init__(self, dim: int, mlp_dim: int, dropout: float, activation: str, norm_first: bool, eps: float) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"got activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.norm_first, self.activation = norm_first, ACTIVATIONS[activation]
        self.linear1, self.linear2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def add(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(norm(x)), or norm(x + branch(x)) as in the paper."""
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward part (figure 1, left).

    Args:
        dim: of the sequence.
        heads: of the attention.
        mlp_dim: hidden units of the feed-forward part.
        dropout: of attention weights, hidden units and branches.
        activation: relu or gelu.
        norm_first: norms before the branches instead of after the sums.
        eps: of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, mlp_dim, dropout, activation, norm_first, eps)
        self.self_attn = MultiHeadAttention(dim, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, L, dim] -> [B, L, dim]; mask and causal as in `MultiHeadAttention`."""
        x = self.add(x, self.norm1, lambda h: self.self_attn(h, None, mask, causal))
        return self.add(x, self.norm2, self.feed_forward)


class DecoderLayer(_Layer):
    """Masked self-attention, attention to the encoder's output, a feed-forward part (figure 1, right).

    Parameters as in `EncoderLayer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, mlp_dim, dropout, activation, norm_first, eps)
        self.self_attn, self.multihead_attn = (MultiHeadAttention(dim, heads, dropout) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=eps)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, L, dim], memory [B, M, dim] -> [B, L, dim]; without `mask` the self-attention is causal."""
        x = self.add(x, self.norm1, lambda h: self.self_attn(h, None, mask, mask is None))
        x = self.add(x, self.norm2, lambda h: self.multihead_attn(h, memory, memory_mask))
        return self.add(x, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    """`depth` encoder layers and, with `final_norm`, a last norm; the other parameters as in `EncoderLayer`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        options = (dim, heads, mlp_dim, dropout, activation, norm_first)
        self.layers = nn.ModuleList(EncoderLayer(*options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, L, dim] -> [B, L, dim]. With `causal` this is a decoder-only model (GPT)."""
        for layer in self.layers:
            x = layer(x, mask, causal)
        return self.norm(x)


class Decoder(nn.Module):
    """`depth` decoder layers and, with `final_norm`, a last norm; the other parameters as in `EncoderLayer`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        options = (dim, heads, mlp_dim, dropout, activation, norm_first)
        self.layers = nn.ModuleList(DecoderLayer(*options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, L, dim], memory [B, M, dim] -> [B, L, dim]."""
        for layer in self.layers:
            x = layer(x, memory, mask, memory_mask)
        return self.norm(x)


class Transformer(nn.Module):
    """Encoder and decoder (figure 1 without embeddings and the last linear layer); defaults are the paper's base model.

    Args:
        dim: of both sequences.
        heads: of every attention.
        encoder_depth, decoder_depth: layers.
        mlp_dim, dropout, activation, norm_first: as in `EncoderLayer`.
    """

    def __init__(
        self,
        dim: int = 512,
        heads: int = 8,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(dim, heads, encoder_depth, mlp_dim, dropout, activation, norm_first)
        self.decoder = Decoder(dim, heads, decoder_depth, mlp_dim, dropout, activation, norm_first)

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """source [B, M, dim], target [B, L, dim] -> [B, L, dim].

        `source_mask` (`key_mask`) hides padding of the source in both halves; without `target_mask` each position of
        the target sees itself and what comes before.
        """
        return self.decoder(target, self.encoder(source, source_mask), target_mask, source_mask)


def sinusoids(length: int, dim: int) -> Tensor:
    """PE [length, dim] of section 3.5: sin and cos of pos / 10000^(2 i / dim) in turn; `dim` is even."""
    if dim % 2:
        raise ValueError(f"got dim={dim}, expected an even number")
    position = torch.arange(length, dtype=torch.float64)[:, None]
    angle = position * torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class SinusoidalPositions(nn.Module):
    """Adds `sinusoids` to sequences of up to `length` positions; nothing is learned or stored."""

    table: Tensor

    def __init__(self, dim: int, length: int = 5000) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(length, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        if x.shape[1] > len(self.table):
            raise ValueError(f"got {x.shape[1]} positions, expected at most {len(self.table)}")
        return x + self.table[: x.shape[1]].to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position, for sequences of up to `length`."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, dim).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        if x.shape[1] > self.pos_embedding.shape[1]:
            raise ValueError(f"got {x.shape[1]} positions, expected at most {self.pos_embedding.shape[1]}")
        return x + self.pos_embedding[:, : x.shape[1]]
