"""Encoder, decoder and U-Net of the autoencoders: keys, options, distributions."""

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.autoencoder import AttnBlock, Decoder, Encoder, LinAttnBlock, Model, get_timestep_embedding, make_attn
from ldm.modules.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl
from ldm.modules.rescale import (
    FirstStagePostProcessor,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
    Resize,
    SimpleDecoder,
    UpsampleDecoder,
    Upsampler,
)

DD = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_attention_against_its_formula():
    block = AttnBlock(32)
    x = torch.randn(2, 32, 4, 5)
    h = block.norm(x)
    q, k, v = (m(h).flatten(2) for m in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 32**-0.5, dim=2)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_linear_attention_against_its_formula():
    block = LinAttnBlock(32)
    x = torch.randn(2, 32, 4, 5)
    q, k, v = block.to_qkv(x).view(2, 3, 32, 20).unbind(1)
    context = torch.einsum("bdn,ben->bde", k.softmax(dim=-1), v)
    expected = block.to_out(torch.einsum("bde,bdn->ben", context, q).reshape(2, 32, 4, 5))
    assert torch.allclose(block(x), expected, atol=1e-5)
    assert set(block.state_dict()) == {"to_qkv.weight", "to_out.weight", "to_out.bias"}


@pytest.mark.parametrize("attn_type, count", [("vanilla", 4), ("vanilla-xformers", 4), ("linear", 4), ("none", 0)])
def test_attention_types_and_places(attn_type, count):
    encoder, decoder = Encoder(**DD, attn_type=attn_type), Decoder(**DD, attn_type=attn_type)
    norms = [
        k for m in (encoder, decoder) for k in m.state_dict() if "attn" in k and k.endswith(("q.weight", "qkv.weight"))
    ]
    # one at 8x8 and one in the middle of the encoder, two and one in the decoder
    assert len(norms) == (count and 5)
    assert decoder(torch.randn(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    assert encoder(torch.randn(1, 3, 16, 16)).shape == (1, 8, 8, 8)


def test_use_linear_attn_is_attn_type_linear():
    assert set(Encoder(**DD, use_linear_attn=True).state_dict()) == set(Encoder(**DD, attn_type="linear").state_dict())
    with pytest.raises(ValueError, match="attn_type: got 'flash'"):
        make_attn(32, "flash")


def test_decoder_options():
    z = torch.randn(1, 4, 8, 8)
    assert Decoder(**DD, give_pre_end=True)(z).shape == (1, 32, 16, 16)
    assert Decoder(**DD, tanh_out=True)(100 * z).abs().max() <= 1
    assert Encoder(**DD, double_z=False)(torch.randn(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    pooled = Encoder(**DD, resamp_with_conv=False)
    assert "down.0.downsample.conv.weight" not in pooled.state_dict()
    assert pooled(torch.randn(1, 3, 32, 16)).shape == (1, 8, 16, 8)


def test_downsampling_pads_right_and_bottom():
    encoder = Encoder(**DD)
    layer = encoder.down[0].downsample
    x = torch.randn(1, 32, 6, 6)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.conv.weight, layer.conv.bias, stride=2)
    assert torch.equal(layer(x), expected)


def test_channels_last_gives_the_same_and_stays():
    decoder = Decoder(**DD).eval()
    z = torch.randn(2, 4, 8, 8)
    expected = decoder(z)
    decoder.to(memory_format=torch.channels_last)
    out = decoder(z.to(memory_format=torch.channels_last))
    assert torch.allclose(out, expected, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_unet_with_time_and_context():
    params = {k: v for k, v in DD.items() if k != "z_channels"}
    model = Model(**{**params, "in_channels": 5})
    keys = set(model.state_dict())
    assert {"temb.dense.0.weight", "temb.dense.1.bias", "down.0.block.0.temb_proj.weight"} <= keys
    assert {"up.0.block.1.nin_shortcut.weight", "up.1.attn.1.q.weight", "mid.attn_1.k.bias"} <= keys
    x, context = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16)
    a = model(x, torch.tensor([1, 5]), context)
    b = model(x, torch.tensor([1, 6]), context)
    assert a.shape == x.shape
    assert torch.allclose(a[0], b[0], atol=1e-6) and not torch.allclose(a[1], b[1], atol=1e-4)
    assert model.get_last_layer() is model.conv_out.weight
    with pytest.raises(ValueError, match="expected timesteps"):
        model(x, None, context)
    still = Model(**params, use_timestep=False)
    assert still(x).shape == x.shape and "temb.dense.0.weight" not in still.state_dict()


def test_time_embedding():
    emb = get_timestep_embedding(torch.tensor([0.0, 3.0]), 7)
    assert emb.shape == (2, 7) and torch.equal(emb[0], torch.tensor([0, 0, 0, 1, 1, 1, 0.0]))
    assert torch.allclose(emb[1, 2], torch.sin(torch.tensor(3e-4)))
    with pytest.raises(ValueError, match="expected \\[B\\]"):
        get_timestep_embedding(torch.zeros(2, 1), 8)


def test_kl_closed_form_against_monte_carlo():
    moments = torch.randn(1, 8, 2, 2, dtype=torch.float64) * 0.5
    q = DiagonalGaussianDistribution(moments)
    p = DiagonalGaussianDistribution(torch.zeros_like(moments))
    n = 200_000
    many = DiagonalGaussianDistribution(moments.expand(n, -1, -1, -1))
    z = many.sample()
    draws = -many.nll(z) + DiagonalGaussianDistribution(torch.zeros_like(many.parameters)).nll(z)
    error = float((draws.mean() - q.kl()).abs())
    assert error < 5 * float(draws.std()) / n**0.5  # five standard errors
    assert torch.allclose(q.kl(), q.kl(p))
    assert torch.allclose(q.kl()[0], normal_kl(q.mean, q.logvar, 0.0, 0.0).sum())


def test_point_masses():
    moments = torch.randn(2, 8, 3, 3)
    q = DiagonalGaussianDistribution(moments, deterministic=True)
    assert torch.equal(q.sample(), q.mode()) and torch.equal(q.kl(), torch.zeros(1))
    assert torch.equal(q.nll(q.mode()), torch.zeros(1))
    x = torch.randn(3)
    assert DiracDistribution(x).sample() is x and DiracDistribution(x).mode() is x
    with pytest.raises(ValueError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_extreme_log_variances_are_bounded():
    q = DiagonalGaussianDistribution(torch.tensor([[0.0, 100.0], [0.0, -100.0]]))
    assert q.logvar.flatten().tolist() == [20.0, -30.0]
    assert q.kl().isfinite().all()


def test_noise_can_be_given():
    q = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3))
    assert torch.equal(q.sample(torch.zeros_like), q.mean)


@pytest.mark.parametrize(
    "model, x, shape",
    [
        (
            lambda: MergedRescaleEncoder(3, 32, 16, 5, 1, [], ch_mult=(1, 2), rescale_factor=0.5),
            (1, 3, 16, 16),
            (1, 5, 4, 4),
        ),
        (
            lambda: MergedRescaleDecoder(32, 3, 16, 1, [], 32, ch_mult=(1, 2), rescale_factor=2.0),
            (1, 32, 4, 4),
            (1, 3, 16, 16),
        ),
        (lambda: Upsampler(4, 8, 32, 3), (1, 32, 4, 4), (1, 3, 8, 8)),
        (lambda: SimpleDecoder(32, 3), (1, 32, 4, 4), (1, 3, 8, 8)),
        (lambda: UpsampleDecoder(32, 3, 32, 1, 8, ch_mult=(2, 1)), (1, 32, 4, 4), (1, 3, 8, 8)),
        (
            lambda: FirstStagePostProcessor([1, 2], 8, Encoder(**DD).requires_grad_(True), n_channels=32),
            (1, 3, 16, 16),
            None,
        ),
    ],
)
def test_rescalers(model, x, shape):
    net = model()
    if isinstance(net, FirstStagePostProcessor):
        net.pretrained_model.encode = net.pretrained_model.forward  # an encoder's interface is that of a first stage
        assert not any(p.requires_grad for p in net.pretrained_model.parameters())
        assert "model.0.temb_proj.weight" in net.state_dict()
        shape = (1, 64, 2, 2)
    assert net(torch.randn(x)).shape == shape


def test_resize():
    x = torch.randn(1, 3, 4, 4)
    assert Resize()(x) is x
    assert Resize()(x, 2.0).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="never released"):
        Resize(3, learned=True)
    with pytest.raises(ValueError, match="at least in_size"):
        Upsampler(8, 4, 32, 3)


def test_patches_become_channels_before_the_first_convolution():
    common = {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 32, "z_channels": 4}
    params = {**common, "ch": 32, "in_channels": 3, "out_ch": 3, "patch_size": 4}
    torch.manual_seed(0)
    encoder, decoder = Encoder(**params), Decoder(**params)
    x = torch.randn(2, 3, 32, 32)
    z = encoder(x)
    assert z.shape == (2, 8, 4, 4) and decoder.z_shape == (1, 4, 4, 4)
    assert decoder(z[:, :4]).shape == x.shape
    assert encoder.conv_in.weight.shape[1] == 48 and decoder.conv_out.weight.shape[0] == 48
    assert len(encoder.down[0].attn) == 1 and len(encoder.down[1].attn) == 0  # resolutions count after the patches
    plain = Encoder(**{**params, "in_channels": 48, "resolution": 8, "patch_size": 1})
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain(torch.nn.functional.pixel_unshuffle(x, 4)), z)
