"""Scaled dot-product attention whose gradient, on processors that MKL is slow on, is made of oneDNN's products.

PyTorch's kernel for the CPU multiplies by MKL, in blocks that suit the forward pass: with the narrow heads of small
networks its backward pass takes four times as long as its forward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules import matmul

LONG = 512  # queries and keys from which on it pays
SHORT, SHORT_BF16 = 64, 256  # keys up to which the formula pays; the kernel's gradient is slowest in bfloat16
BLOCK = 2**20  # scores that are held at once: larger products share their work better among the cores


class _Attention(torch.autograd.Function):
    """q [B, h, N, d], k, v [B, h, M, d] -> [B, h, N, d]; holds no scores for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        delta = (grad * out).sum(-1, keepdim=True)
        scale = q.shape[-1] ** -0.5
        flat = [t.flatten(0, 1) for t in (q * scale, k, v, grad, delta)]
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        for head in zip(*flat, *(g.flatten(0, 1) for g in grads), strict=True):
            _head_gradient(*head)
        grads[0].mul_(scale)
        return tuple(grads)


def _head_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, delta: Tensor, for_q: Tensor, for_k: Tensor, for_v: Tensor
) -> None:
    """Fills for_q [N, d], for_k, for_v [M, d]: "FlashAttention" (Dao et al. 2022), algorithm 4, over queries only."""
    product, rows = matmul.product, max(1, BLOCK // len(k))
    for_k.zero_()
    for_v.zero_()
    for i in range(0, len(q), rows):
        q_i, grad_i = q[i : i + rows], grad[i : i + rows]
        p = product(q_i, k, None).softmax(-1)
        s = product(grad_i, v, None).sub_(delta[i : i + rows]).mul_(p)
        for_q[i : i + rows] = product(s, k.t(), None)
        for_k.t().add_(product(q_i.t(), s.t(), None))
        for_v.t().add_(product(grad_i.t(), p.t(), None))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention`: q [B, h, N, d], k, v [B, h, M, d], mask as it takes it -> [B, h, N, d]."""
    if not dropout:
        if not causal and mask is None and matmul.MKL_IS_SLOW and torch.is_grad_enabled() and _pays(q, k, v):
            return _Attention.apply(q, k, v)
        if q.device.type == "cpu" and q.requires_grad and k.shape[-2] <= _short(q):
            return _formula(q, k, v, _causal(q, k) if causal else mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V as it is written: with few keys its gradient is several times as fast as the
    kernel's.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def _short(q: Tensor) -> int:
    return SHORT_BF16 if q.dtype == torch.bfloat16 else SHORT


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """bool [N, M]: query i sees the keys up to i."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


def _pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a gradient of long float32 sequences on the CPU, computed as it is written."""
    if min(q.shape[-2], k.shape[-2]) < LONG or not (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if q.dtype != torch.float32 or q.device.type != "cpu" or q.dim() != 4 or q.shape[-1] != v.shape[-1]:
        return False
    return not torch.compiler.is_compiling() and matmul.is_plain()
