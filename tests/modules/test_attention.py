"""Attention blocks against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules import attention


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, [N, D] each."""
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_token_views_are_free_in_channels_last():
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    tokens = attention.to_tokens(x)
    assert tokens.shape == (2, 15, 8) and tokens.is_contiguous() and tokens.data_ptr() == x.data_ptr()
    back = attention.from_tokens(tokens, x)
    assert torch.equal(back, x) and back.data_ptr() == x.data_ptr()


def test_geglu_is_its_formula_with_and_without_gradients():
    geglu = attention.GEGLU(6, 10)
    x = torch.randn(2, 3, 6)
    h = F.linear(x, geglu.proj.weight, geglu.proj.bias)
    want = h[..., :10] * F.gelu(h[..., 10:])
    torch.testing.assert_close(geglu(x), want)
    with torch.no_grad():
        torch.testing.assert_close(geglu(x), want)


def test_feed_forward_keys():
    gated, plain = attention.FeedForward(4, glu=True), attention.FeedForward(4, dim_out=6)
    assert "net.0.proj.weight" in gated.state_dict() and gated(torch.randn(2, 4)).shape == (2, 4)
    assert "net.0.0.weight" in plain.state_dict() and plain(torch.randn(2, 4)).shape == (2, 6)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_softmax_attention(masked):
    torch.manual_seed(0)
    layer = attention.CrossAttention(12, 10, heads=3, dim_head=4)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    keep = torch.rand(2, 7) > 0.4 if masked else torch.ones(2, 7, dtype=torch.bool)
    keep[:, 0] = True
    want = torch.empty(2, 5, 12)
    for b in range(2):
        c = context[b, keep[b]]
        q, k, v = layer.to_q(x[b]), layer.to_k(c), layer.to_v(c)
        heads = [softmax_attention(*(t[:, i : i + 4] for t in (q, k, v))) for i in (0, 4, 8)]
        want[b] = layer.to_out(torch.cat(heads, dim=-1))
    got = layer(x, context, mask=keep if masked else None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_cross_attention_without_a_context_looks_at_its_input():
    layer = attention.CrossAttention(8, heads=2, dim_head=4)
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), layer(x, x))


def test_cross_attention_says_what_a_context_should_be():
    layer = attention.CrossAttention(8, 6, heads=2, dim_head=4)
    with pytest.raises(ValueError, match=r"got context \[2, 7, 5\], expected \[B, M, 6\]"):
        layer(torch.randn(2, 5, 8), torch.randn(2, 7, 5))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(2, 5, 8))


def test_self_attention_can_be_replaced_by_attention_to_the_context():
    block = attention.BasicTransformerBlock(8, 2, 4, context_dim=6, disable_self_attn=True)
    assert block.attn1.to_k.weight.shape == (8, 6)
    assert block(torch.randn(2, 5, 8), torch.randn(2, 3, 6)).shape == (2, 5, 8)


def test_linear_and_convolutional_projections_give_equal_numbers():
    torch.manual_seed(0)
    conv = attention.SpatialTransformer(32, 2, 8, depth=2, context_dim=6)
    linear = attention.SpatialTransformer(32, 2, 8, depth=2, context_dim=6, use_linear=True)
    torch.nn.init.normal_(conv.proj_out.weight)
    linear.load_state_dict({k: v.squeeze() for k, v in conv.state_dict().items()})
    x, context = torch.randn(2, 32, 4, 3), torch.randn(2, 5, 6)
    torch.testing.assert_close(conv(x, context), linear(x, context))
    assert (conv.norm.eps, conv.norm.num_groups) == (1e-6, 32)


def test_a_transformer_takes_one_context_per_block():
    torch.manual_seed(0)
    net = attention.SpatialTransformer(32, 2, 8, depth=2, context_dim=[6, 7])
    assert [b.attn2.to_k.weight.shape[1] for b in net.transformer_blocks] == [6, 7]
    x, contexts = torch.randn(2, 32, 4, 3), [torch.randn(2, 5, 6), torch.randn(2, 4, 7)]
    assert net(x, contexts).shape == x.shape
    with pytest.raises(ValueError, match="got 3 contexts, expected 1 or 2"):
        net(x, contexts + contexts[:1])
    with pytest.raises(ValueError, match="expected one width or 3"):
        attention.SpatialTransformer(32, 2, 8, depth=3, context_dim=[6, 7])
    shared = attention.SpatialTransformer(32, 2, 8, depth=3, context_dim=[6, 6])
    assert len(shared.transformer_blocks) == 3


def test_linear_attention_is_its_formula():
    torch.manual_seed(0)
    layer = attention.LinearAttention(6, heads=2, dim_head=3)
    x = torch.randn(2, 6, 4, 5)
    q, k, v = layer.to_qkv(x).reshape(2, 3, 2, 3, 20).unbind(1)
    summary = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    want = layer.to_out(torch.einsum("bhde,bhdn->bhen", summary, q).reshape(2, 6, 4, 5))
    torch.testing.assert_close(layer(x), want)
    assert set(layer.state_dict()) == {"to_qkv.weight", "to_out.weight", "to_out.bias"}


@pytest.mark.parametrize("kind", [attention.QKVAttention, attention.QKVAttentionLegacy])
def test_the_two_orders_of_channels(kind):
    qkv = torch.randn(2, 3 * 8, 5)
    want = torch.empty(2, 8, 5)
    for b in range(2):
        for head in range(2):
            if kind is attention.QKVAttention:
                q, k, v = (qkv[b, i * 8 + head * 4 : i * 8 + head * 4 + 4].T for i in range(3))
            else:
                q, k, v = (qkv[b, head * 12 + i * 4 : head * 12 + i * 4 + 4].T for i in range(3))
            want[b, head * 4 : head * 4 + 4] = softmax_attention(q, k, v).T
    torch.testing.assert_close(kind(2)(qkv), want)
    with pytest.raises(ValueError, match="multiple of 3"):
        kind(5)(qkv)


@pytest.mark.parametrize("size", [[6], [4, 3], [2, 4, 3]])
def test_attention_block_over_any_number_of_axes(size):
    block = attention.AttentionBlock(32, num_head_channels=8)
    x = torch.randn(2, 32, *size)
    assert block.num_heads == 4
    assert torch.equal(block(x), x), "starts as the identity"
    torch.nn.init.normal_(block.proj_out.weight)
    want = x.flatten(2) + block.proj_out(block.attention(block.qkv(block.norm(x).flatten(2))))
    torch.testing.assert_close(block(x), want.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_attention_block_refuses_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads=5"):
        attention.AttentionBlock(32, num_heads=5)
    with pytest.raises(ValueError, match="num_head_channels=5"):
        attention.AttentionBlock(32, num_head_channels=5)


def test_attention_pool_is_attention_from_the_mean():
    torch.manual_seed(0)
    pool = attention.AttentionPool2d(4, 16, 8, output_dim=5)
    x = torch.randn(2, 16, 4, 4)
    tokens = torch.cat([x.flatten(2).mean(-1, keepdim=True), x.flatten(2)], dim=-1) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens).chunk(3, dim=1)
    heads = [
        torch.stack([softmax_attention(*(t[b, h : h + 8].T for t in (q, k, v)))[0] for b in range(2)]) for h in (0, 8)
    ]
    want = F.linear(torch.cat(heads, dim=-1), pool.c_proj.weight[..., 0], pool.c_proj.bias)
    torch.testing.assert_close(pool(x), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="got 9 positions, expected 16"):
        pool(torch.randn(2, 16, 3, 3))
    with pytest.raises(ValueError, match="num_head_channels=5"):
        attention.AttentionPool2d(4, 16, 5)
