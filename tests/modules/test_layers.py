"""Convolutions, norms, resampling, residual blocks and time embeddings."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules import layers
from tests.reference import compare

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"


def test_timestep_embedding_gives_the_official_numbers():
    fx = compare.load(FIXTURES / "timestep_embedding.json")
    t = compare.inputs(fx)["timesteps"]
    outs = {
        "dim320": layers.timestep_embedding(t, 320),
        "dim33": layers.timestep_embedding(t, 33),
        "max_period_100": layers.timestep_embedding(t, 32, max_period=100),
        "repeat_only": layers.timestep_embedding(t, 5, repeat_only=True),
        "float": layers.timestep_embedding(torch.tensor([0.5, 998.25]), 64),
    }
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []
    assert torch.equal(layers.Timestep(320)(t), outs["dim320"])


@pytest.mark.parametrize(
    "kernel, stride, size", [(3, 1, 4), (3, 2, 4), (3, 1, 5), (3, 2, 5), (1, 1, 4), (1, 2, 4), (3, 1, 1)]
)
@pytest.mark.parametrize("weight_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("input_format", [torch.channels_last, torch.contiguous_format])
def test_the_fast_ways_of_a_convolution_give_its_numbers(kernel, stride, size, weight_format, input_format):
    torch.manual_seed(0)
    conv = layers.Conv2d(6, 128, kernel, stride=stride, padding=kernel // 2).to(memory_format=weight_format)
    x = torch.randn(2, 6, size, size + 1).contiguous(memory_format=input_format)
    with torch.no_grad():
        got = conv(x)
        assert conv._few_positions(x)
    want = F.conv2d(x.contiguous(), conv.weight.contiguous(), conv.bias, stride, kernel // 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_convolution_takes_the_fast_way_only_where_it_is_one():
    conv, x = layers.Conv2d(6, 128, 3, padding=1), torch.randn(2, 6, 4, 4)
    assert not conv._few_positions(x), "gradients go through the convolution kernels"
    with torch.no_grad():
        assert conv._few_positions(x)
        assert not conv._few_positions(torch.randn(8, 6, 16, 16)), "many positions"
        assert not conv._few_positions(x.bfloat16())
        for special in (
            dict(dilation=2, padding=2),
            dict(padding=1, padding_mode="circular"),
            dict(padding=1, groups=2),
        ):
            conv = layers.Conv2d(6, 128, 3, **special)
            plain = nn.Conv2d(6, 128, 3, **special)
            plain.load_state_dict(conv.state_dict())
            assert torch.equal(conv(x), plain(x))
        assert layers.Conv2d(6, 128, 1)(x[0]).shape == (128, 4, 4), "unbatched, as nn.Conv2d"


def test_factories_refuse_other_dimensions():
    for factory in (layers.conv_nd, layers.avg_pool_nd):
        with pytest.raises(ValueError, match="dims=4"):
            factory(4, 3, 3)
    assert isinstance(layers.conv_nd(3, 2, 2, 1), nn.Conv3d)
    assert isinstance(layers.avg_pool_nd(1, 2), nn.AvgPool1d)


def test_zero_module_and_silu():
    conv = layers.zero_module(nn.Conv2d(2, 2, 1))
    assert all((p == 0).all() for p in conv.parameters())
    x = torch.randn(5)
    want, held = F.silu(x), x.clone().requires_grad_()
    assert torch.equal(layers.silu(held * 1), want)
    with torch.no_grad():
        y = x.clone()
        assert layers.silu(y).data_ptr() == y.data_ptr()
        assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_keeps_the_dtype_and_counts_in_float(dtype):
    norm = layers.normalization(64)
    assert (norm.eps, norm.num_groups) == (1e-5, 32)
    x = (torch.randn(2, 64, 8, 8) * 10 + 200).to(dtype)  # the squares of this overflow float16
    want = F.group_norm(x.float(), 32)
    for module in (norm, norm.to(dtype)):
        got = module(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError):
        layers.normalization(48)


@pytest.mark.parametrize("dims, size, double", [(1, [8], [16]), (2, [8, 4], [16, 8]), (3, [3, 8, 4], [3, 16, 8])])
@pytest.mark.parametrize("use_conv", [True, False])
def test_resampling_halves_and_doubles(dims, size, double, use_conv):
    small, large = torch.randn(2, 4, *size), torch.randn(2, 4, *double)
    assert list(layers.Upsample(4, use_conv, dims)(small).shape) == [2, 4, *double]
    assert list(layers.Downsample(4, use_conv, dims)(large).shape) == [2, 4, *size]
    if use_conv:
        assert list(layers.Upsample(4, True, dims, out_channels=6)(small).shape) == [2, 6, *double]
        assert list(layers.Downsample(4, True, dims, out_channels=6)(large).shape) == [2, 6, *size]


def test_resampling_refuses_wrong_channels():
    for module in (layers.Upsample(4, False), layers.Downsample(4, False)):
        with pytest.raises(ValueError, match="got 3 channels, expected 4"):
            module(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="out_channels=6"):
        layers.Downsample(4, False, out_channels=6)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}])
def test_res_block_is_its_formula(scale_shift, resample):
    torch.manual_seed(0)
    block = layers.ResBlock(32, 16, 0.0, out_channels=64, use_scale_shift_norm=scale_shift, **resample)
    nn.init.normal_(block.out_layers[3].weight, std=0.05)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    move = nn.Identity()
    if "up" in resample:
        move = nn.Upsample(scale_factor=2, mode="nearest")
    if "down" in resample:
        move = nn.AvgPool2d(2)
    h = block.in_layers[2](move(F.silu(block.in_layers[0](x))))
    e = block.emb_layers(emb)[:, :, None, None]
    norm = block.out_layers[0]
    h = norm(h) * (1 + e[:, :64]) + e[:, 64:] if scale_shift else norm(h + e)
    want = block.skip_connection(move(x)) + block.out_layers[3](F.silu(h))
    torch.testing.assert_close(block(x, emb), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        kept = x.clone()
        torch.testing.assert_close(block(x, emb), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, kept), "inputs are not written to"


def test_res_block_skip_connections():
    assert isinstance(layers.ResBlock(32, 8, 0.0).skip_connection, nn.Identity)
    assert layers.ResBlock(32, 8, 0.0, out_channels=64).skip_connection.kernel_size == (1, 1)
    assert layers.ResBlock(32, 8, 0.0, out_channels=64, use_conv=True).skip_connection.kernel_size == (3, 3)


def test_res_block_starts_as_the_identity():
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(layers.ResBlock(32, 8, 0.0)(x, torch.randn(2, 8)), x)


def test_checkpoint_with_dropout_draws_the_same_mask_again():
    torch.manual_seed(0)
    block = layers.ResBlock(32, 8, 0.5, use_checkpoint=True)
    nn.init.normal_(block.out_layers[3].weight, std=0.05)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    grads = []
    for use in (True, False):
        block.use_checkpoint = use
        torch.manual_seed(1)
        (g,) = torch.autograd.grad(block(x, emb).square().sum(), block.in_layers[2].weight)
        grads.append(g)
    torch.testing.assert_close(*grads)
