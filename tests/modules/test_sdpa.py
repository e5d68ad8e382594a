"""Attention with a gradient of our own: that of PyTorch in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules import matmul, sdpa
from ldm.modules.sdpa import attention


@pytest.fixture
def own(monkeypatch):
    """As on a processor that MKL is slow on, with small blocks; counts the heads whose gradient is ours."""
    heads, gradient = [], sdpa._head_gradient

    def counted(*args: Tensor) -> None:
        heads.append(len(args))
        gradient(*args)

    monkeypatch.setattr(matmul, "MKL_IS_SLOW", torch.backends.mkldnn.is_available())
    monkeypatch.setattr(sdpa, "_head_gradient", counted)
    monkeypatch.setattr(sdpa, "BLOCK", 2**16)
    return heads


def tensors(n: int, m: int, d: int = 6) -> list[Tensor]:
    """[2, 3, N, d] and two of [2, 3, M, d], which lie in memory as [2, N, 3, d]."""
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, d).transpose(1, 2).requires_grad_() for length in (n, m, m)]


@pytest.mark.smoke
@pytest.mark.parametrize(("n", "m"), [(512, 512), (700, 520)])
def test_gradient(own, n, m):
    leaves = tensors(n, m)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, expected = attention(*leaves), F.scaled_dot_product_attention(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    for g, e in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)
    assert len(own) == (6 if matmul.MKL_IS_SLOW else 0)


def test_stays_with_pytorch(own):
    """Short sequences, a mask, other dtypes, autocast, no gradient."""
    q, k, v = tensors(512, 512)
    mask = torch.ones(512, 512, dtype=torch.bool)
    short = attention(q[:, :, :100], k, v)
    masked = attention(q, k, v, mask)
    double = attention(q.double(), k.double(), v.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention(q, k, v)
    for out in (short, masked, double, cast):
        out.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), masked, rtol=1e-5, atol=1e-6)
    assert own == []


@pytest.mark.parametrize("keys", [5, sdpa.SHORT, sdpa.SHORT + 1])
@pytest.mark.parametrize("masked", [False, True, "causal"])
def test_few_keys_go_by_the_formula(keys, masked):
    torch.manual_seed(0)
    causal = masked == "causal"
    q, k, v = (
        torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (keys if causal else 7, keys, keys)
    )
    mask = None
    if masked is True:
        mask = torch.rand(2, 1, 1, keys) < 0.7
        mask[..., 0] = True
    got = sdpa.attention(q, k, v, mask, causal=causal)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keys", [sdpa.SHORT_BF16, sdpa.SHORT_BF16 + 1])
def test_more_keys_go_by_the_formula_in_bfloat16(keys, monkeypatch):
    """Whose gradient is at most half as far again from the exact one as the kernel's: both round to bfloat16."""
    torch.manual_seed(0)
    calls, formula = [], sdpa._formula
    monkeypatch.setattr(sdpa, "_formula", lambda *args: calls.append(1) or formula(*args))
    exact = [torch.randn(1, 2, n, 16, requires_grad=True) for n in (65, keys, keys)]
    leaves = [t.detach().bfloat16().requires_grad_() for t in exact]
    weight = torch.randn(1, 2, 65, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, kernel = attention(*leaves), F.scaled_dot_product_attention(*leaves)
    assert len(calls) == (keys == sdpa.SHORT_BF16)
    expected = torch.autograd.grad((F.scaled_dot_product_attention(*exact) * weight).sum(), exact)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (got, kernel))
    for e, a, b in zip(expected, ours, theirs, strict=True):
        assert (a - e).norm() <= 1.5 * (b - e).norm() < 0.05 * e.norm()
