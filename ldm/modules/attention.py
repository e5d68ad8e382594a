"""Attention over image positions and over a context, in the forms of the latent diffusion U-Net.

All of it goes through `ldm.modules.sdpa.attention`. Images are read as token lists [B, N, C] with N = H * W,
which is a view, not a copy, where they are channels-last.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.layers import checkpoint, conv_nd, normalization, zero_module
from ldm.modules.matmul import Linear, linear
from ldm.modules.sdpa import attention


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, *spatial] -> [B, N, C]: a view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def from_tokens(x: Tensor, like: Tensor) -> Tensor:
    """[B, N, C] -> [B, C, *spatial of like], a channels-last view."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *like.shape[2:])


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution with kernel size one as one matrix product on tokens [B, N, C] -> [B, N, C']."""
    return linear(x, conv.weight.flatten(1), conv.bias)


class GEGLU(nn.Module):
    """x W_1 * gelu(x W_2), both in one projection ("GLU Variants Improve Transformer", equation 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        # two products of half the width: what they give is contiguous, and its gradients need not be joined
        (w_x, w_gate), (b_x, b_gate) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        x, gate = linear(x, w_x, b_x), linear(x, w_gate, b_gate)
        if torch.is_grad_enabled():
            return x * F.gelu(gate)
        return x.mul_(torch.ops.aten.gelu_(gate))


class FeedForward(nn.Module):
    """Two linear layers with a GEGLU (`glu`) or GELU between them; `mult` widens the inner one."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        first = GEGLU(dim, inner) if glu else nn.Sequential(Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim_out]."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from `x` to `context`, or to `x` itself where no context is given."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads, self.context_dim = heads, context_dim or query_dim
        self.to_q = Linear(query_dim, inner, bias=False)
        self.to_k = Linear(self.context_dim, inner, bias=False)
        self.to_v = Linear(self.context_dim, inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C], context [B, M, D], mask bool [B, M] (True = may be attended to) -> [B, N, C]."""
        context = x if context is None else context
        if context.shape[-1] != self.context_dim:
            raise ValueError(f"got context {list(context.shape)}, expected [B, M, {self.context_dim}]")
        q, k, v = (
            f(s).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, s in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        if mask is not None:
            mask = mask.flatten(1)[:, None, None, :]
        h = attention(q, k, v, mask)
        return self.to_out(h.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward layer, each after a layer norm and with a skip.

    `disable_self_attn`: the first attention looks at the context too. `checkpoint`: recompute in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.checkpoint, self.dropout, self.disable_self_attn = checkpoint, dropout, disable_self_attn

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, N, C], context [B, M, D] or None (attend to x) -> [B, N, C]."""
        return checkpoint(self.checkpoint, self.dropout, self._forward, x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = self.attn1(self.norm1(x), context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of an image, between two projections, with a skip.

    `context_dim`: one width for all blocks or a list of `depth` widths. `use_linear`: the projections are linear
    layers (SD 2, SDXL) instead of 1x1 convolutions; the numbers are the same, the key shapes differ.
    The input norm has eps 1e-6, unlike those of the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, inner = in_channels, n_heads * d_head
        widths = list(context_dim) if isinstance(context_dim, Sequence) else [context_dim] * depth
        if len(widths) != depth and len(set(widths)) != 1:
            raise ValueError(f"got context_dim={widths}, expected one width or {depth} of them")
        widths = widths if len(widths) == depth else widths[:1] * depth
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout, width, checkpoint=use_checkpoint, disable_self_attn=disable_self_attn
            )
            for width in widths
        )
        self.proj_out = zero_module(Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x [B, C, H, W], context [B, M, D] (or one such tensor per block) -> [B, C, H, W]."""
        contexts = context if isinstance(context, list | tuple) else [context]
        if len(contexts) not in (1, len(self.transformer_blocks)):
            raise ValueError(f"got {len(contexts)} contexts, expected 1 or {len(self.transformer_blocks)}")
        h = pointwise(self.proj_in, to_tokens(self.norm(x)))
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, contexts[i if len(contexts) > 1 else 0])
        return from_tokens(pointwise(self.proj_out, h), x) + x


class LinearAttention(nn.Module):
    """Attention with softmax over the keys only, linear in the number of positions ("Efficient Attention", eq. 3)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        q, k, v = pointwise(self.to_qkv, to_tokens(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        summary = torch.einsum("bnhd,bnhe->bhde", k.softmax(dim=1), v)
        h = torch.einsum("bhde,bnhd->bnhe", summary, q)
        return from_tokens(pointwise(self.to_out, h.flatten(2)), x)


class QKVAttentionLegacy(nn.Module):
    """Multi-head attention on one tensor whose channels are split into heads first, then into q, k and v."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, N, 3C] -> q, k, v, each [B, N, heads, C / heads]."""
        return qkv.unflatten(-1, (self.n_heads, 3, -1)).unbind(3)

    def tokens(self, qkv: Tensor) -> Tensor:
        """[B, N, 3C] -> [B, N, C]."""
        q, k, v = (t.transpose(1, 2) for t in self.split(qkv))
        return attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, qkv: Tensor) -> Tensor:
        """[B, 3C, N] -> [B, C, N]."""
        if qkv.shape[1] % (3 * self.n_heads):
            raise ValueError(f"got {qkv.shape[1]} channels, expected a multiple of 3 * {self.n_heads}")
        return self.tokens(qkv.transpose(1, 2)).transpose(1, 2)


class QKVAttention(QKVAttentionLegacy):
    """The same with the channels split into q, k and v first, then into heads."""

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, N, 3C] -> q, k, v, each [B, N, heads, C / heads]."""
        return qkv.unflatten(-1, (3, self.n_heads, -1)).unbind(2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of an image, with a skip; any number of spatial axes.

    `num_head_channels` (width of a head) takes precedence over `num_heads` unless it is -1.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(
                    f"got {channels} channels, expected a multiple of num_head_channels={num_head_channels}"
                )
            num_heads = channels // num_head_channels
        if channels % num_heads:
            raise ValueError(f"got {channels} channels, expected a multiple of num_heads={num_heads}")
        self.channels, self.num_heads, self.use_checkpoint = channels, num_heads, use_checkpoint
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = QKVAttention(num_heads) if use_new_attention_order else QKVAttentionLegacy(num_heads)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C, *spatial]."""
        return checkpoint(self.use_checkpoint, 0.0, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.attention.tokens(pointwise(self.qkv, to_tokens(self.norm(x))))
        return x + from_tokens(pointwise(self.proj_out, h), x)


class AttentionPool2d(nn.Module):
    """Pools an image by attention from its mean to all positions, as CLIP's image tower does.

    `spacial_dim` is the height and width of the input (the spelling is that of the official argument).
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        if embed_dim % num_heads_channels:
            raise ValueError(f"got {embed_dim} channels, expected a multiple of num_head_channels={num_heads_channels}")
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.attention = QKVAttention(embed_dim // num_heads_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, output_dim]."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        if x.shape[-1] != self.positional_embedding.shape[-1]:
            raise ValueError(f"got {x.shape[-1] - 1} positions, expected {self.positional_embedding.shape[-1] - 1}")
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]
