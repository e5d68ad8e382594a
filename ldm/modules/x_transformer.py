"""The transformer encoder behind LDM's BERT and layout embedders, with x-transformers' key names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, dim] -> [B, L, dim]; the inner width is heads * dim_head, not dim.

    Args:
        dim: width of input and output.
        heads: number of heads.
        dim_head: width of a head.
        dropout: on the attention weights, in training.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool [B, L], False = padding, which nobody attends to."""
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )  # [B, heads, L, dim_head]
        p = self.dropout.p if self.training else 0.0
        allowed = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        return self.to_out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear; [B, L, dim] -> [B, L, dim]."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        inner = dim * mult
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, inner), nn.GELU()), nn.Dropout(dropout), nn.Linear(inner, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """`depth` times pre-norm attention and pre-norm feed-forward; the final norm belongs to `TransformerWrapper`.

    Args:
        dim: width.
        depth: attention + feed-forward pairs.
        heads: heads of each attention.
        attn_dim_head: width of a head.
        attn_dropout: dropout on attention weights.
        ff_mult: width of the feed-forward layer in units of dim.
        ff_dropout: dropout inside the feed-forward layer.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        attn_dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_mult: int = 4,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = Attention(dim, heads, attn_dim_head, attn_dropout)
            self.layers.append(nn.ModuleList((nn.LayerNorm(dim), attention)))
            self.layers.append(nn.ModuleList((nn.LayerNorm(dim), FeedForward(dim, ff_mult, ff_dropout))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, dim] -> [B, L, dim]; `mask` as in `Attention`."""
        for norm, block in self.layers:
            x = x + (block(norm(x), mask) if isinstance(block, Attention) else block(norm(x)))
        return x


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector per position, [B, L, D] -> [L, D]."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        length, limit = x.shape[1], self.emb.num_embeddings
        if length > limit:
            raise ValueError(f"got {length} tokens, expected at most {limit}")
        return self.emb.weight[:length]


class TransformerWrapper(nn.Module):
    """Tokens -> embeddings -> `attn_layers` -> norm (-> logits).

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: longest input.
        attn_layers: the stack of blocks, e.g. `Encoder(dim, depth)`.
        emb_dim: width of the token table, attn_layers.dim if None; another width adds a projection.
        emb_dropout: dropout on the embeddings, in training.
        tie_embedding: logits from the token table instead of a layer of their own.
        use_pos_emb: add a learned vector per position.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: Encoder,
        emb_dim: int | None = None,
        emb_dropout: float = 0.0,
        tie_embedding: bool = False,
        use_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        emb_dim = emb_dim or dim
        if tie_embedding and emb_dim != dim:
            raise ValueError(f"got emb_dim {emb_dim} with tie_embedding, expected {dim}")
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len) if use_pos_emb else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embedding else nn.Linear(dim, num_tokens)

    def forward(self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None) -> Tensor:
        """[B, L] int64 tokens -> logits [B, L, num_tokens], or the normed output [B, L, dim] if `return_embeddings`.

        `mask`: bool [B, L], False = padding. The official embedders pass none: padding is attended to.
        """
        x = self.token_emb(x)
        if self.pos_emb is not None:
            x = x + self.pos_emb(x)
        x = self.norm(self.attn_layers(self.project_emb(self.emb_dropout(x)), mask))
        if return_embeddings:
            return x
        return F.linear(x, self.token_emb.weight) if self.to_logits is None else self.to_logits(x)
