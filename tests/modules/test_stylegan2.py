"""StyleGAN2's operations and networks against the reference numbers, and against slow formulations of themselves."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.modules import stylegan2_ops as ops
from ldm.modules.ada import PRESETS, AdaptiveAugment, AugmentPipe, DiffAugment
from ldm.modules.stylegan2 import Discriminator, Generator, MappingNetwork, mix_styles, style_mixing
from ldm.modules.stylegan2_layers import Conv2dLayer, MinibatchStdLayer, SynthesisLayer
from tests.reference import compare, filler

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"
TINY = dict(
    z_dim=8, c_dim=0, w_dim=8, img_resolution=16, img_channels=3, channel_base=128, channel_max=16, num_fp16_res=0
)


def load(name):
    return compare.load(FIXTURES / f"stylegan2_{name}.json")


def build(cls, fx):
    model = cls(**fx["params"])
    compare.check_keys(model, fx)
    return filler.fill(model, fx["seed"], fx["fill_rules"]).eval()


# --- reference numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generator", "generator_no_noise", "generator_orig_rgb1"])
@torch.no_grad()
def test_generator_fixture(name):
    fx = load(name)
    m, z = build(Generator, fx), compare.inputs(fx)["z"]
    outs = {}
    for psi, cut in ((1, None), (0.5, None), (0.7, 3)):
        ws = m.mapping(z, None, truncation_psi=psi, truncation_cutoff=cut)
        outs[f"ws.psi{psi}_cut{cut}"] = ws
        outs[f"img.psi{psi}_cut{cut}"] = m.synthesis(ws, noise_mode="const")
    for res, x, img in m.synthesis.steps(ws, noise_mode="const"):
        outs[f"b{res}.x"] = x
        if img is not None:
            outs[f"b{res}.img"] = img
    ws = m.mapping(z, None)
    outs["img.noise_none"] = m.synthesis(ws, noise_mode="none")
    outs["img.const.not_fused"] = m.synthesis(ws, noise_mode="const", fused_modconv=False)
    m.mapping(z, None, update_emas=True)
    outs["w_avg_after_update"] = m.mapping.w_avg
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []
    assert torch.equal(m(z, noise_mode="const"), m.synthesis(ws, noise_mode="const"))


@torch.no_grad()
def test_mapping_fixture():
    fx = load("mapping_8_layers")
    m, z = build(MappingNetwork, fx), compare.inputs(fx)["z"]
    outs = {
        "ws": m(z, None),
        "psi0.7": m(z, None, truncation_psi=0.7),
        "psi0.7_cut8": m(z, None, truncation_psi=0.7, truncation_cutoff=8),
        "psi0": m(z, None, truncation_psi=0),
    }
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


@pytest.mark.parametrize("name", ["discriminator", "discriminator_skip"])
def test_discriminator_fixture(name):
    fx = load(name)
    m, img = build(Discriminator, fx), compare.inputs(fx)["img"].requires_grad_()
    logits = m(img, None)
    (grad,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    r1 = grad.square().sum((1, 2, 3))
    (F.softplus(-logits).mean() + 0.5 * r1.mean()).backward()
    outs = {"logits": logits, "logits_4": m(img[:4], None), "grad_img": grad, "r1": r1}
    outs |= {f"grad:{k}": p.grad for k, p in m.named_parameters() if f"grad:{k}" in fx["outputs"]}
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


def test_keys_of_the_1024_pixel_networks():
    fx = load("keys_ffhq1024")
    common = {k: v for k, v in fx["params"].items() if k not in ("z_dim", "w_dim")}
    with torch.device("meta"):
        nets = {"G": Generator(**fx["params"]), "D": Discriminator(**common)}
    for name, net in nets.items():
        compare.check_keys(net, {"keys": fx["keys"][name]})
        assert sum(p.numel() for p in net.parameters()) == int(float(fx["outputs"][f"{name}_params"]["mean"]))


def ops_outputs(fx):
    """Every output of the fixture, by what its name says."""
    specs = {(s["name"], tuple(s["shape"])): s for s in fx["inputs"]}
    draw = {k: filler.draw(fx["seed"], s["name"], s["shape"], s["kind"]) for k, s in specs.items()}
    x, w, w1 = draw["x", (2, 3, 12, 12)], draw["w", (5, 3, 3, 3)], draw["w1", (5, 3, 1, 1)]
    b, styles = draw["b", (3,)], draw["styles", (2, 3)]
    f = ops.setup_filter([1, 3, 3, 1])
    outs = {
        "filter": f,
        "upfirdn_up2": ops.upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1], gain=4),
        "upfirdn_down2": ops.upfirdn2d(x, f, down=2, padding=1),
        "upsample2d": ops.upsample2d(x, f),
        "downsample2d": ops.downsample2d(x, f),
        "filter2d": ops.filter2d(x, f),
        "bias_act.lrelu_gain_clamp": ops.bias_act(x, b, act="lrelu", alpha=0.1, gain=2.0, clamp=0.9),
        "upfirdn_flip_crop": ops.upfirdn2d(x, ops.setup_filter([1, 2, 4]), padding=[-1, 2, 0, -2], flip_filter=True),
    }
    for act in ops.ACTIVATIONS:
        outs[f"bias_act.{act}"] = ops.bias_act(x, b, act=act)
    for name in fx["outputs"]:
        part = name.split(".")
        if part[0] == "conv2d_resample":
            up, down, k, flip = int(part[1][2:]), int(part[2][4:]), int(part[3][1:]), part[4] == "flipTrue"
            kernel = w if k == 3 else w1
            outs[name] = ops.conv2d_resample(x, kernel, f, up=up, down=down, padding=k // 2, flip_weight=flip)
        if part[0] == "modulated_conv2d":
            up = int(part[2][2:])
            options = dict(demodulate=part[1] == "demodTrue", fused_modconv=part[3] == "fusedTrue")
            noise = draw["noise", (2, 1, 12 * up, 12 * up)]
            resample = dict(up=up, padding=1, resample_filter=f, flip_weight=up == 1)
            outs[name] = ops.modulated_conv2d(x, w, styles, noise, **resample, **options)
    return outs


def test_ops_fixture():
    fx = load("ops")
    outs = ops_outputs(fx)
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


# --- operations against their definition ------------------------------------------------------------------------------


def plain_upfirdn2d(x, f, up, down, padding, flip_filter, gain):
    """As the docstring defines it: insert zeros, pad or crop, filter, keep every down-th pixel."""
    b, c, h, w = x.shape
    (ux, uy), (dx, dy), (left, right, top, bottom) = up, down, padding
    y = x.new_zeros(b, c, h * uy, w * ux)
    y[:, :, ::uy, ::ux] = x
    y = F.pad(y, (left, right, top, bottom))
    f2 = torch.outer(f, f) if f.ndim == 1 else f
    f2 = f2 if flip_filter else f2.flip(0, 1)
    return F.conv2d(y, f2.expand(c, 1, *f2.shape), groups=c)[:, :, ::dy, ::dx] * gain


@pytest.mark.parametrize("taps", [[1.0, 2, 4], list(range(1, 10)), [[1.0, 2, 3], [4, 5, 7]]])
@pytest.mark.parametrize("up", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("down", [(1, 1), (1, 2), (3, 2)])
def test_upfirdn2d_is_its_definition(taps, up, down):
    x, f = filler.draw(0, "x", (2, 3, 9, 11)).double(), ops.setup_filter(taps).double()
    for padding in ((0, 0, 0, 0), (2, 2, 1, 1), (-1, 3, 4, -2), (12, 0, 0, 13)):
        for flip in (False, True):
            got = ops.upfirdn2d(x, f, up, down, padding, flip, gain=1.5)
            want = plain_upfirdn2d(x, f, up, down, padding, flip, 1.5)
            torch.testing.assert_close(got, want)


def test_setup_filter():
    assert ops.setup_filter([1, 3, 3, 1]).shape == (4, 4) and ops.setup_filter(range(8)).shape == (8,)
    assert ops.setup_filter([1, 3], separable=True).tolist() == [0.25, 0.75]
    assert ops.setup_filter(None).tolist() == [[1.0]] and ops.setup_filter(2, normalize=False).tolist() == [[4.0]]
    assert ops.setup_filter([1, 3], flip_filter=True, gain=4)[0, 0] == 4 * 0.75**2
    assert ops.setup_filter([1, 2], normalize=False).tolist() == [[1, 2], [2, 4]]
    for bad in ([[[1.0]]], []):
        with pytest.raises(ValueError, match="filter: got"):
            ops.setup_filter(bad)
    with pytest.raises(ValueError, match="expected one where"):
        ops.setup_filter([[1.0]], separable=True)


def test_faults_of_operations():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\]"):
        ops.upfirdn2d(x[0], None)
    with pytest.raises(ValueError, match="up: got 0"):
        ops.upfirdn2d(x, None, up=0)
    with pytest.raises(ValueError, match="at least the filter's size"):
        ops.upfirdn2d(x, ops.setup_filter([1] * 6))
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        ops.bias_act(x, act="gelu")
    with pytest.raises(ValueError, match=r"bias: got shape \[3\], expected \[2\]"):
        ops.bias_act(x, torch.zeros(3))
    with pytest.raises(ValueError, match="clamp: got -1"):
        ops.bias_act(x, clamp=-1)
    with pytest.raises(ValueError, match="styles: got"):
        ops.modulated_conv2d(x, torch.zeros(3, 2, 3, 3), torch.zeros(2, 2))


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_conv2d_resample_is_its_definition(up, down, k):
    x, f = filler.draw(0, "x", (2, 3, 8, 8)).double(), ops.setup_filter([1, 2, 5, 3]).double()
    w = filler.draw(0, "w", (4, 3, k, k)).double()
    for flip_weight in (False, True):
        for flip_filter in (False, True):
            for extra in (0, 1):
                p = k // 2 + extra  # four taps: two and one around a pixel going up, one and one going down
                p0 = p + (2 if up == 2 else 0) + (1 if down == 2 else 0)
                p1 = p + (1 if up == 2 else 0) + (1 if down == 2 else 0)
                y, sides = x, (p0, p1, p0, p1)
                if up == 2:
                    y = plain_upfirdn2d(y, f, (2, 2), (1, 1), sides, flip_filter, 4)
                else:
                    y = F.pad(y, sides)
                y = F.conv2d(y, w if flip_weight else w.flip(2, 3))
                if down == 2:
                    y = plain_upfirdn2d(y, f, (1, 1), (2, 2), (0, 0, 0, 0), flip_filter, 1)
                got = ops.conv2d_resample(x, w, f, up, down, k // 2 + extra, flip_weight, flip_filter)
                torch.testing.assert_close(got, y)
                b = filler.draw(0, "b", (4,)).double()
                got = ops.conv2d_resample(x, w, f, up, down, k // 2 + extra, flip_weight, flip_filter, b)
                torch.testing.assert_close(got, y + b[:, None, None])


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "swish"])
@pytest.mark.parametrize("down", [1, 2])
def test_a_convolution_layer_is_its_operations_one_after_the_other(act, down):
    layer = Conv2dLayer(3, 4, 3, activation=act, down=down, conv_clamp=0.9).double()
    with torch.no_grad():
        layer.bias.copy_(filler.draw(1, "b", (4,)))
    x = filler.draw(1, "x", (2, 3, 8, 8)).double()
    y = ops.conv2d_resample(x, layer.weight * layer.weight_gain, layer.resample_filter, down=down, padding=1)
    for gain in (1.0, 0.5):
        want = ops.bias_act(y, layer.bias, act=act, gain=layer.act_gain * gain, clamp=0.9 * gain)
        torch.testing.assert_close(layer(x, gain=gain), want)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_filters_in_bfloat16_are_those_of_float32(up, down):
    f = ops.setup_filter([1, 3, 3, 1])
    x = filler.draw(3, "x", (2, 8, 16, 16)).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    got, want = (ops.upfirdn2d(v, f, up=up, down=down, padding=2) for v in (x, wide))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16())
    for y in (got, want):
        y.float().square().sum().backward()
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=2**-6, atol=2**-6)


def plain_modulated_conv2d(x, weight, styles, up, f, demodulate):
    """Equations 1 to 3 of the paper: one set of weights per image, zero insertion, full convolution."""
    out = []
    for image, s in zip(x, styles, strict=True):
        w = weight * s.view(1, -1, 1, 1)
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        p = weight.shape[-1] // 2
        if up == 2:
            y = plain_upfirdn2d(image[None], f, (2, 2), (1, 1), (2 + p, 1 + p, 2 + p, 1 + p), False, 4)
            out.append(F.conv2d(y, w.flip(2, 3)))
        else:
            out.append(F.conv2d(image[None], w, padding=p))
    return torch.cat(out)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_conv2d_and_its_gradients(up, demodulate, k, batch):
    f = ops.setup_filter([1, 3, 3, 1]).double()
    shapes = {"x": (batch, 3, 6, 6), "w": (4, 3, k, k), "s": (batch, 3)}
    leaves = [filler.draw(1, n, s).double().requires_grad_() for n, s in shapes.items()]
    options = dict(up=up, padding=k // 2, resample_filter=f, flip_weight=up == 1, demodulate=demodulate)
    want = plain_modulated_conv2d(*leaves, up, f, demodulate)
    g = filler.draw(1, "g", want.shape).double()
    grads = torch.autograd.grad(want, leaves, g)
    for fused in (False, True):
        got = ops.modulated_conv2d(*leaves, **options, fused_modconv=fused)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves, g), grads, strict=True):
            torch.testing.assert_close(a, b)
    scaled = ops.modulated_conv2d(*leaves, **options, noise=g[:, :1], gain=3.0)
    torch.testing.assert_close(scaled, want * 3 + g[:, :1])


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.8])
def test_bias_act_can_be_differentiated_twice(act, clamp):
    x = filler.draw(2, "x", (3, 4, 2)).double().requires_grad_()
    b = filler.draw(2, "b", (4,)).double().requires_grad_()
    want = ops.ACTIVATIONS[act][0](x + b[:, None], 0.2 if act == "lrelu" else 0.0) * 1.3
    want = want if clamp is None else want.clamp(-clamp, clamp)

    def fn(x, b):
        return ops.bias_act(x, b, act=act, gain=1.3, clamp=clamp)

    torch.testing.assert_close(fn(x, b), want)
    assert torch.autograd.gradcheck(fn, (x, b)) and torch.autograd.gradgradcheck(fn, (x, b))
    other_axis = ops.bias_act(x.transpose(1, 2), b, dim=2, act=act, gain=1.3, clamp=clamp)
    torch.testing.assert_close(other_axis.transpose(1, 2), want)
    assert torch.equal(x, filler.draw(2, "x", (3, 4, 2)).double())  # nothing in place but on our own copy


def test_bias_act_without_bias_leaves_its_input_alone():
    x = torch.tensor([[-2.0, 3.0]])
    torch.testing.assert_close(ops.bias_act(x, act="lrelu", gain=1, clamp=1), torch.tensor([[-0.4, 1.0]]))
    assert x.tolist() == [[-2.0, 3.0]]


def test_float16_does_not_overflow_in_a_modulated_convolution():
    x, w = filler.draw(3, "x", (2, 8, 6, 6)) * 20, filler.draw(3, "w", (4, 8, 3, 3))
    styles = filler.draw(3, "s", (2, 8)) * 3000  # x * s would be beyond 65504
    got = ops.modulated_conv2d(x.half(), w, styles, padding=1)
    want = ops.modulated_conv2d(x, w, styles, padding=1)
    assert got.dtype == torch.float16 and torch.isfinite(got).all()
    assert (got.float() - want).abs().max() < 0.01 * want.abs().max()


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_architectures_train(architecture):
    torch.manual_seed(0)
    G = Generator(**TINY, architecture=architecture)
    D = Discriminator(0, 16, 3, architecture, channel_base=128, channel_max=16)
    img = G(torch.randn(4, 8))
    assert img.shape == (4, 3, 16, 16)
    F.softplus(-D(img)).mean().backward()
    without = [n for n, p in [*G.named_parameters(), *D.named_parameters()] if p.grad is None]
    assert without == []
    skips = {n.split(".")[1] for n in G.state_dict() if ".skip." in n}
    assert skips == ({"b8", "b16"} if architecture == "resnet" else set())
    assert sum(n.endswith("torgb.weight") for n in G.state_dict()) == (3 if architecture == "skip" else 1)
    assert G.num_ws == 6


def test_a_fresh_network_keeps_the_variance():
    """Equalised learning rate, demodulation and activation gains: unit variance in, unit variance out."""
    torch.manual_seed(0)
    layer = SynthesisLayer(64, 64, 32, 16)
    with torch.no_grad():
        y = layer(torch.randn(4, 64, 16, 16), torch.randn(4, 32), noise_mode="none")
    assert 0.9 < y.square().mean().sqrt() < 1.1


def test_conditional_networks_see_the_condition():
    torch.manual_seed(0)
    G = Generator(**{**TINY, "c_dim": 3}, mapping_kwargs={"num_layers": 2, "embed_features": 5, "layer_features": 7})
    D = Discriminator(3, 16, 3, channel_base=128, channel_max=16, mapping_kwargs={"num_layers": 1})
    assert G.mapping.embed.weight.shape == (5, 3) and G.mapping.fc0.weight.shape == (7, 13)
    assert "mapping.w_avg" not in D.state_dict() and D.b4.out.weight.shape == (16, 16)
    z, c = torch.randn(1, 8).repeat(2, 1), torch.eye(3)[:2]
    img = G(z, c, noise_mode="const")
    assert (img[0] - img[1]).abs().max() > 1e-3
    logits = D(img[:1].repeat(2, 1, 1, 1), c)
    assert logits.shape == (2, 1) and (logits[0] - logits[1]).abs() > 1e-4
    assert Discriminator(3, 16, 3, channel_base=128, cmap_dim=5).b4.out.weight.shape[0] == 5
    only_c = MappingNetwork(0, 3, 4, None, num_layers=1)
    assert only_c(None, torch.eye(3)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"c: got None, expected \[B, 3\]"):
        G(z, None)
    with pytest.raises(ValueError, match=r"z: got \[2, 3\], expected \[B, 8\]"):
        G(c, c)


def test_noise_modes():
    torch.manual_seed(0)
    G = Generator(**TINY)
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(1.0)
    ws = G.mapping(torch.randn(2, 8), None)
    const = G.synthesis(ws, noise_mode="const")
    assert torch.equal(const, G.synthesis(ws, noise_mode="const"))
    assert not torch.allclose(const, G.synthesis(ws, noise_mode="none"))
    assert not torch.allclose(G.synthesis(ws), G.synthesis(ws))
    calls = []

    def randn(like):
        calls.append(list(like.shape))
        return torch.ones_like(like)

    a, b = (G.synthesis(ws, randn=randn) for _ in range(2))
    assert torch.equal(a, b) and calls[:5] == [[2, 1, r, r] for r in (4, 8, 8, 16, 16)]
    with pytest.raises(ValueError, match="noise_mode: got 'rand'"):
        G.synthesis(ws, noise_mode="rand")


def test_steps_stop_where_the_caller_stops():
    G = Generator(**TINY)
    run = []
    for res in (4, 8, 16):
        getattr(G.synthesis, f"b{res}").register_forward_hook(lambda m, i, o: run.append(m.resolution))
    features = next(x for res, x, _ in G.synthesis.steps(G.mapping(torch.randn(1, 8), None)) if res == 8)
    assert features.shape == (1, 16, 8, 8) and run == [4, 8]


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@torch.no_grad()
def test_output_through_tanh(architecture):
    linear, squashed = (Generator(**TINY, architecture=architecture, output=o) for o in ("linear", "tanh"))
    squashed.load_state_dict(linear.state_dict())
    ws = 9 * torch.randn(4, linear.num_ws, 8)
    plain, image = (g.synthesis(ws, noise_mode="const") for g in (linear, squashed))
    assert plain.abs().max() > 1 and torch.equal(image, torch.tanh(plain))
    before = [x for res, _, x in squashed.synthesis.steps(ws, "const") if res == 8][0]
    wanted = [x for res, _, x in linear.synthesis.steps(ws, "const") if res == 8][0]
    assert before is None is wanted or torch.equal(before, wanted)  # once, at the end
    with pytest.raises(ValueError, match="output: got 'sigmoid', expected one of linear, tanh"):
        Generator(**TINY, output="sigmoid")


@torch.no_grad()
def test_low_precision_of_the_upper_blocks():
    torch.manual_seed(0)
    options = {**TINY, "num_fp16_res": 2}
    G = Generator(**options, fp16_dtype="bfloat16").eval()
    assert [getattr(G.synthesis, f"b{r}").use_fp16 for r in (4, 8, 16)] == [False, True, True]
    seen = {}
    for res, x, img in G.synthesis.steps(G.mapping(torch.randn(2, 8), None), noise_mode="const"):
        seen[res] = (x.dtype, img.dtype)
    assert seen == {r: (torch.float32 if r == 4 else torch.bfloat16, torch.float32) for r in (4, 8, 16)}
    z = torch.randn(2, 8)
    low, full = G(z, noise_mode="const"), G(z, noise_mode="const", force_fp32=True)
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()
    plain = Generator(**TINY).eval()
    plain.load_state_dict(G.state_dict())
    assert torch.equal(plain(z, noise_mode="const"), full)
    half = Generator(**options).eval()  # float16 is for GPUs: the same numbers as in float32 here
    half.load_state_dict(G.state_dict())
    assert torch.equal(half(z, noise_mode="const"), full)
    D = Discriminator(0, 16, 3, channel_base=128, num_fp16_res=1, block_kwargs={"fp16_dtype": "bfloat16"})
    assert D(low).dtype == torch.float32
    assert 0 < (D(low) - D(low, force_fp32=True)).abs().max() < 0.05
    assert not any(b.use_fp16 for b in (G.synthesis.b4, D.b8))


@torch.no_grad()
def test_conv_clamp_limits_every_activation():
    torch.manual_seed(0)
    G = Generator(**TINY, conv_clamp=0.5)
    for _, x, _ in G.synthesis.steps(G.mapping(torch.randn(2, 8), None)):
        assert x.abs().max() <= 0.5
    D = Discriminator(0, 16, 3, "orig", channel_base=128, conv_clamp=0.25)
    x, _ = D.b16(None, torch.randn(2, 3, 16, 16) * 5)
    assert x.abs().max() == 0.25


def test_frozen_layers_keep_their_names_and_their_weights():
    names = list(Discriminator(0, 16, 3, channel_base=128).state_dict())
    D = Discriminator(0, 16, 3, channel_base=128, block_kwargs={"freeze_layers": 5})
    assert sorted(D.state_dict()) == sorted(names)
    trained = {n for n, _ in D.named_parameters()}
    frozen = {n for n in names if not n.endswith("resample_filter")} - trained
    parts = ("b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0")
    assert frozen == {f"{p}.{k}" for p in parts for k in ("weight", "bias")} - {"b16.skip.bias"}


def test_minibatch_std():
    x = filler.draw(4, "x", (4, 2, 3, 3))
    layer = MinibatchStdLayer(2, 1)  # images 0 and 2, 1 and 3 are groups
    y = layer(x)
    for a, b in ((0, 2), (1, 3)):
        std = torch.stack([x[a], x[b]]).std(0, correction=0).mean()
        torch.testing.assert_close(y[[a, b], 2], std.expand(2, 3, 3), atol=1e-4, rtol=0)
    assert MinibatchStdLayer(None, 2)(x).shape == (4, 4, 3, 3)
    assert torch.allclose(MinibatchStdLayer(4)(x[:3])[:, 2], MinibatchStdLayer(3)(x[:3])[:, 2])
    assert MinibatchStdLayer(4)(x[:1])[0, 2].max() < 1e-3
    assert "b4.conv.weight" in Discriminator(0, 8, 3, epilogue_kwargs={"mbstd_num_channels": 0}).state_dict()


def test_mapping_average_and_truncation():
    torch.manual_seed(0)
    m = MappingNetwork(4, 0, 4, 3, num_layers=2, w_avg_beta=0.5)
    z = torch.randn(64, 4)
    w = m(z, None)[:, 0]
    for _ in range(30):
        m(z, None, update_emas=True)
    torch.testing.assert_close(m.w_avg, w.mean(0))
    torch.testing.assert_close(m(z, None, truncation_psi=0)[:, 2], m.w_avg.expand(64, 4))
    cut = m(z, None, truncation_psi=0.5, truncation_cutoff=1)
    torch.testing.assert_close(cut[:, 1:], w[:, None].repeat(1, 2, 1))
    torch.testing.assert_close(cut[:, 0], (w + m.w_avg) / 2)
    with pytest.raises(ValueError, match="without w_avg"):
        MappingNetwork(4, 0, 4, None)(z, None, truncation_psi=0.5)
    with pytest.raises(ValueError, match="at least one above 0"):
        MappingNetwork(0, 0, 4, None)


def test_style_mixing():
    a, b = torch.zeros(500, 6, 2), torch.ones(500, 6, 2)
    assert mix_styles(a, b, 2)[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1]
    mixed = style_mixing(a, b, prob=0.9, generator=torch.Generator().manual_seed(0))[:, :, 0]
    assert torch.all(mixed.diff(dim=1) >= 0) and torch.all(mixed[:, 0] == 0)
    crossed = mixed.sum(1)
    assert 0.85 < (crossed > 0).float().mean() < 0.95 and set(crossed.unique().tolist()) == {0, 1, 2, 3, 4, 5}
    assert torch.equal(style_mixing(a, b, prob=0), a)
    with pytest.raises(ValueError, match="equal shapes"):
        mix_styles(a, b[:1], 2)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    G, z = Generator(**TINY).eval(), torch.randn(3, 8)
    alone = torch.cat([G(z[i : i + 1], noise_mode="const") for i in range(3)])
    torch.testing.assert_close(alone, G(z, noise_mode="const"), atol=1e-5, rtol=1e-4)


def test_activations_are_channels_last():
    G = Generator(**TINY)
    for res, x, _ in G.synthesis.steps(G.mapping(torch.randn(2, 8), None)):
        assert x.is_contiguous(memory_format=torch.channels_last), res


def test_faults_of_networks():
    with pytest.raises(ValueError, match="img_resolution: got 48, expected a power of two"):
        Generator(**{**TINY, "img_resolution": 48})
    with pytest.raises(ValueError, match="at least 8"):
        Discriminator(0, 4, 3)
    with pytest.raises(ValueError, match="architecture: got 'unet'"):
        Generator(**TINY, architecture="unet")
    with pytest.raises(ValueError, match="fp16_dtype: got 'int8'"):
        Generator(**TINY, fp16_dtype="int8")
    with pytest.raises(TypeError, match="use_nois"):
        Generator(**TINY, use_nois=True)
    with pytest.raises(ValueError, match=r"img: got \[1, 3, 8, 8\], expected \[B, 3, 16, 16\]"):
        Discriminator(0, 16, 3, channel_base=128)(torch.zeros(1, 3, 8, 8))
    G = Generator(**TINY)
    with pytest.raises(ValueError, match=r"ws: got \[1, 2, 8\], expected \[B, 6, 8\]"):
        G.synthesis(torch.zeros(1, 2, 8))


@torch.no_grad()
def test_the_benchmark_compares_equal_networks():
    from benchmarks import stylegan2 as benchmark

    torch.manual_seed(0)
    for architecture in ("skip", "resnet"):
        G = Generator(**TINY, architecture=architecture)
        D = Discriminator(0, 16, 3, architecture, channel_base=128)
        ws = G.mapping(torch.randn(4, 8), None)
        outs = {}
        for plain in (False, True):
            with benchmark.formulation(plain):
                img = G.synthesis(ws, noise_mode="const")
                outs[plain] = (img, D(img))
        for ours, plain in zip(outs[False], outs[True], strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_nothing_stays_behind_on_the_cpu():
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"), torch.no_grad():
        G = Generator(**{**TINY, "c_dim": 2, "num_fp16_res": 2})
        D = Discriminator(2, 16, 3, channel_base=128, num_fp16_res=2)
        z, c = torch.randn(4, 8), torch.zeros(4, 2)
        steps = list(G.synthesis.steps(style_mixing(G.mapping(z, c, 0.7, update_emas=True), G.mapping(z, c))))
        assert [x.dtype for _, x, _ in steps] == [torch.float32, torch.float16, torch.float16]
        img = AdaptiveAugment(AugmentPipe(**PRESETS["bgcfnc"]))(DiffAugment()(steps[-1][2]))
        logits = D(img, c)
        assert (img.device.type, logits.device.type, logits.dtype) == ("cuda", "cuda", torch.float32)
