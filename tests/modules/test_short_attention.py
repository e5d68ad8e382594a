import pytest
import torch
import torch.nn.functional as F

from ldm.modules.classifiers.transformer import SHORT, attention


@pytest.mark.parametrize("keys", [5, SHORT, SHORT + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_formula_is_the_fused_kernel(keys, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, keys, keys))
    mask = torch.rand(2, 1, 1, keys) < 0.7 if masked else None
    if masked:
        mask[..., 0] = True
    got, expected = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
