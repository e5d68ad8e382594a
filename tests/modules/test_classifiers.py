"""Every classifier against its twin in torchvision or timm, and what all of them have in common."""

import importlib
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from ldm.modules.classifiers import common, enet, nin, resnet, transformer, vit

torch.set_num_threads(1)
TORCHVISION = {
    "alexnet": ["alexnet"],
    "vgg": [f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")],
    "googlenet": ["googlenet"],
    "inception": ["inception_v3"],
    "resnet": [f"resnet{n}" for n in (18, 34, 50, 101, 152)],
    "vit": ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"],
}
TIMM = {
    "inception": {"inception_v4": "inception_v4"},
    "resnet": {f"seresnet{n}": f"seresnet{n}" for n in (18, 34, 50, 101, 152)},
    "senet": {"senet154": "legacy_senet154"},
    "vit": {
        "vit_ti_16": "vit_tiny_patch16_224",
        "vit_s_16": "vit_small_patch16_224",
        "vit_s_32": "vit_small_patch32_224",
    },
}
TWINS = [(f, n, "torchvision", n) for f, names in TORCHVISION.items() for n in names]
TWINS += [(f, n, "timm", twin) for f, names in TIMM.items() for n, twin in names.items()]
# pixels where they are not 224: those of the paper, and four patches for ViTs whose weights take the time already
SIZES = {"inception_v3": 299, "inception_v4": 299, "vit_l_16": 32, "vit_l_32": 64, "vit_h_14": 28}
# PEERS: parameters in millions, with auxiliary heads
MILLIONS = {
    "alexnet": 61.10,
    "vgg16": 138.36,
    "vgg19": 143.67,
    "googlenet": 13.00,
    "inception_v3": 27.16,
    "inception_v4": 42.68,
    "resnet18": 11.69,
    "resnet34": 21.80,
    "resnet50": 25.56,
    "resnet101": 44.55,
    "resnet152": 60.19,
    "seresnet50": 28.09,
    "senet154": 115.09,
    "vit_ti_16": 5.72,
    "vit_s_16": 22.05,
    "vit_b_16": 86.57,
    "vit_l_16": 304.33,
    "vit_h_14": 632.05,
}
# without the auxiliary heads
MILLIONS_WITHOUT = {"googlenet": 6.62, "inception_v3": 23.83}
FAMILY = {n: f for f, n, _, _ in TWINS} | {"nin": "nin", "enet_encoder": "enet"}


def ours(name, **params):
    return getattr(importlib.import_module(f"ldm.modules.classifiers.{FAMILY[name]}"), name)(**params)


def twin(package, name, **params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if package == "timm":
            return timm.create_model(name, **params)
        if name in ("googlenet", "inception_v3"):
            params = {"init_weights": False, **params}
        return getattr(torchvision.models, name)(**params)


def random_state(module, seed=0):
    """A value for every tensor, with activations of order one and batch-norm statistics that matter."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for key, t in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(3)
        elif key.endswith("running_var"):
            state[key] = torch.rand(t.shape, generator=g) + 0.5
        elif t.ndim < 2:
            around = 0.8 if key.endswith("weight") else 0.0
            state[key] = around + 0.1 * torch.randn(t.shape, generator=g)
        else:
            state[key] = torch.empty(t.shape).uniform_(-1, 1, generator=g).mul_((3 / t[0].numel()) ** 0.5)
    return state


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.mark.parametrize(("family", "name", "package", "other"), TWINS, ids=[t[1] for t in TWINS])
def test_keys_and_shapes_are_those_of_the_twin(family, name, package, other):
    # timm computes its drop rates by tensors, which have no value on the meta device
    b = on_meta(twin, package, other) if package == "torchvision" else twin(package, other)
    a, b = on_meta(ours, name), b.state_dict()
    if (family, package) == ("vit", "timm"):  # renamed while they are loaded
        b = a.adapt_state(b)
    assert {k: tuple(v.shape) for k, v in a.state_dict().items()} == {k: tuple(v.shape) for k, v in b.items()}


def millions_of(build, *args, **params):
    return sum(p.numel() for p in on_meta(build, *args, **params).parameters()) / 1e6


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts(name, millions):
    assert millions_of(ours, name) == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("name", "millions"), MILLIONS_WITHOUT.items())
def test_parameter_counts_without_auxiliary_heads(name, millions):
    assert millions_of(ours, name, aux_logits=False) == pytest.approx(millions, abs=0.005)


def test_parameter_counts_without_a_twin():
    count = {
        "nin": millions_of(nin.nin, 10, stem="small"),
        "resnet20": millions_of(resnet.resnet20),
        "resnet110": millions_of(resnet.resnet110),
        "plain20": millions_of(resnet.plain20),
        "enet": millions_of(enet.enet, 20),
    }
    assert count["nin"] == pytest.approx(0.967, abs=5e-4)
    assert count["resnet20"] == pytest.approx(0.27, abs=5e-3)  # table 6 of the paper
    assert count["resnet110"] == pytest.approx(1.7, abs=0.05)
    assert count["plain20"] == count["resnet20"]  # option A: shortcuts cost nothing
    assert count["enet"] == pytest.approx(0.37, abs=0.01)


@pytest.mark.parametrize(("family", "name", "package", "other"), TWINS, ids=[t[1] for t in TWINS])
def test_outputs_are_those_of_the_twin(family, name, package, other):
    size, params = SIZES.get(name, 224), {"num_classes": 10}
    b_params = {**params, "image_size" if package == "torchvision" else "img_size": size} if family == "vit" else params
    a = on_meta(ours, name, **params, **({"image_size": size} if family == "vit" else {}))
    b = twin(package, other, **b_params) if package == "timm" else on_meta(twin, package, other, **b_params)
    state = random_state(b)
    b.load_state_dict(state, assign=True)
    a.load_state_dict(a.adapt_state(state) if family == "vit" else state, assign=True)  # one storage for both
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = a.eval()(x), b.eval()(x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 224), ("inception_v3", 299)])
def test_auxiliary_outputs_in_training_mode_are_torchvisions(name, size):
    a, b = on_meta(ours, name, num_classes=10), on_meta(twin, "torchvision", name, num_classes=10)
    state = random_state(a)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for net in (a, b):
        net.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
        torch.manual_seed(5)  # of dropout
        outputs.append(net.train()(x))
    logits, aux = outputs[0]
    assert len(aux) == len(outputs[1]) - 1
    for got, expected in zip((logits, *aux), outputs[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(a.eval()(x), torch.Tensor)


# --- what all networks have in common ---------------------------------------------------------------------------------

SLIM = {  # one of each family, slim
    "alexnet": {"norm": "bn"},
    "nin": {"norm": "bn"},
    "vgg11_bn": {},
    "googlenet": {},
    "inception_v3": {},
    "inception_v4": {},
    "resnet18": {},
    "resnet50": {},
    "seresnet18": {},
    "senet154": {},
    "enet_encoder": {},
    "vit_ti_16": {"width": 0.34, "depth": 2},
}


@pytest.mark.parametrize("name", SLIM)
def test_small_stem_width_classes_and_channels(name):
    torch.manual_seed(0)
    params = {"num_classes": 7, "in_channels": 1, "width": 0.125, "stem": "small", **SLIM[name]}
    net = ours(name, **params)
    x = torch.randn(4, 1, 32, 32)
    out = net(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    assert logits.shape == (4, 7)
    # a fresh head of zeros (ViT) passes no gradient on: give it a value first
    if name.startswith("vit"):
        nn.init.normal_(net.heads.head.weight)
        out = net(x)
    loss = sum(o.pow(2).sum() for o in ([out] if isinstance(out, torch.Tensor) else [out.logits, *out.aux]))
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    wide = sum(p.numel() for p in on_meta(ours, name, **{**params, "width": 1.0}).parameters())
    assert sum(p.numel() for p in net.parameters()) < wide


@pytest.mark.parametrize("stem", common.STEMS)
@pytest.mark.parametrize("name", [n for n in SLIM if not n.startswith("vit")])
def test_smallest_image_is_said_truly(name, stem):
    net = ours(name, num_classes=3, width=0.125, stem=stem, **SLIM[name]).eval()
    smallest = net.min_size
    with torch.no_grad():
        assert net(torch.randn(1, 3, smallest, smallest)).shape == (1, 3)
    if smallest > 1:
        below = torch.randn(1, 3, smallest - 1, smallest - 1)
        with pytest.raises(ValueError, match=f"got images of {smallest - 1}x{smallest - 1}, expected at least"):
            net(below)
        net.min_size = 1
        with pytest.raises(RuntimeError):
            net(below)


@pytest.mark.parametrize(
    ("build", "params", "message"),
    [
        (resnet.resnet18, {"stem": "tiny"}, "got stem='tiny'"),
        (resnet.resnet18, {"width": 0}, "got width=0"),
        (resnet.resnet18, {"drop_path": 1.0}, "got drop_path"),
        (resnet.resnet18, {"num_classes": 0}, "got num_classes=0"),
        (vit.vit_b_16, {"image_size": 30}, "expected a divisor of image_size=30"),
        (vit.vit_b_16, {"pool": "max"}, "got pool='max'"),
        (nin.nin, {"norm": "ln"}, "got norm='ln'"),
    ],
)
def test_wrong_parameters(build, params, message):
    with pytest.raises(ValueError, match=message):
        on_meta(build, **params)


def test_wrong_images():
    net = resnet.resnet20(in_channels=1)
    with pytest.raises(ValueError, match=r"got images \[2, 3, 32, 32\], expected \[B, 1, H, W\]"):
        net(torch.zeros(2, 3, 32, 32))
    net = vit.vit_ti_16(stem="small", depth=1)
    with pytest.raises(ValueError, match="got images of 40x40, expected 32x32"):
        net(torch.zeros(2, 3, 40, 40))


# --- residual networks ------------------------------------------------------------------------------------------------


def test_residual_blocks_can_start_as_the_identity():
    for build in (resnet.resnet18, resnet.resnet20):
        net = build(width=0.5, stem="small", zero_init_residual=True)
        x = torch.randn(2, net.conv1.out_channels, 8, 8).relu()
        torch.testing.assert_close(net.layer1(x), x)
    assert resnet.resnet18(width=0.125).layer1[0].bn2.weight.all()
    assert resnet.plain20(zero_init_residual=True).layer1[0].bn2.weight.all()  # it would be silent


def test_option_a_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 4, 6, 6)
    y = resnet.PadShortcut(4, 2)(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2]) and not y[:, 4:].any()


def test_plain_network_has_no_shortcut():
    torch.manual_seed(0)
    a, b = resnet.plain20(num_classes=4), resnet.resnet20(num_classes=4)
    b.load_state_dict(a.state_dict())
    block, x = a.layer1[0], torch.randn(2, 16, 8, 8).relu()
    torch.testing.assert_close(block(x), block.branch(x).relu())
    torch.testing.assert_close(b.layer1[0](x), (b.layer1[0].branch(x) + x).relu())


def test_drop_path():
    torch.manual_seed(0)
    drop = common.DropPath(0.25)
    y = drop(torch.ones(4000, 2, 1))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(y.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(y[:, 0], y[:, 1])  # per image
    assert torch.equal(drop.eval()(y), y)
    net = resnet.resnet20(drop_path=0.5)
    assert [round(b.drop_path.rate, 4) for s in net.stages() for b in s] == [round(i / 16, 4) for i in range(9)]


# --- ENet -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", common.STEMS)
@pytest.mark.parametrize("size", [(32, 48), (33, 35)])
def test_enet_labels_every_pixel(stem, size):
    net = enet.enet(5, stem=stem, width=0.5)
    out = net(torch.randn(2, 3, *size))
    assert out.shape == (2, 5, *size)
    out.sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_enet_unpools_to_where_the_maxima_were():
    up = enet.Upsample(4, 4, 0.0).eval()
    nn.init.zeros_(up.branch[6].weight)  # the branch is silent: only the skip is left
    nn.init.dirac_(up.skip[0].weight)
    x, where = nn.functional.max_pool2d(torch.rand(1, 4, 8, 8), 2, 2, return_indices=True)
    y = up(x, where)
    assert torch.equal(y.flatten(2).gather(2, where.flatten(2)) > 0, torch.ones(1, 4, 16, dtype=torch.bool))
    assert int((y > 0).sum()) == 64


# --- ViT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 96])
def test_position_embeddings_are_resized_as_torchvision_does(size):
    state = random_state(on_meta(vit.vit_ti_16, num_classes=5, image_size=64, depth=1))
    expected = interpolate_embeddings(size, 16, dict(state))["encoder.pos_embedding"]
    net = vit.vit_ti_16(num_classes=5, image_size=size, depth=1)
    net.load_state_dict(net.adapt_state(state))
    torch.testing.assert_close(net.encoder.pos_embedding, expected)
    with pytest.raises(ValueError, match="expected a square number"):
        vit.resize_positions(torch.zeros(1, 13, 4), 2)


def test_timm_weights_fit_by_renaming():
    b = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()
    b.load_state_dict(random_state(b))
    a = vit.vit_ti_16(num_classes=7, image_size=32, patch_size=8, depth=2).eval()
    a.load_state_dict(a.adapt_state(b.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)


def test_old_torchvision_names_of_the_linear_layers():
    net = vit.vit_ti_16(num_classes=5, image_size=32, depth=1)
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in net.state_dict().items()}
    net.load_state_dict(net.adapt_state(old))


def test_mean_pooling_reads_the_patches():
    net = vit.vit_ti_16(num_classes=3, image_size=32, depth=1, pool="mean").eval()
    nn.init.normal_(net.heads.head.weight)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), net.heads(net.encoder(net.tokens(x))[:, 1:].mean(1)))


# --- transformer blocks against torch.nn ------------------------------------------------------------------------------


@pytest.fixture
def sequences():
    g = torch.Generator().manual_seed(0)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    return torch.randn(2, 7, 16, generator=g), torch.randn(2, 5, 16, generator=g), keep


def test_attention(sequences):
    x, context, keep = sequences
    a, b = transformer.MultiHeadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a(x), b(x, x, x)[0])
    expected = b(x, context, context, key_padding_mask=~keep)[0]
    torch.testing.assert_close(a(x, context, transformer.key_mask(keep)), expected)
    mask = transformer.causal_mask(7)
    expected, weights = b(x, x, x, attn_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(a(x, mask=mask), expected)
    torch.testing.assert_close(a(x, causal=True), expected)
    torch.testing.assert_close(a.weights(x), b(x, x, x, average_attn_weights=False)[1])
    with pytest.raises(ValueError, match="expected one of them"):
        a(x, mask=mask, causal=True)
    with pytest.raises(ValueError, match="heads that divide dim"):
        transformer.MultiHeadAttention(16, 5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder(sequences, activation, norm_first):
    _, x, keep = sequences
    options = {"activation": activation, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, **options)
    b = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    a = transformer.Encoder(16, 4, 2, 32, dropout=0.0, **options)
    b.load_state_dict(random_state(b))
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a(x), b(x))
    expected = b(x, src_key_padding_mask=~keep)
    torch.testing.assert_close(a(x, transformer.key_mask(keep)), expected)
    torch.testing.assert_close(a(x, causal=True), b(x, mask=~transformer.causal_mask(5)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder(sequences, norm_first):
    target, source, keep = sequences
    b = nn.Transformer(16, 4, 2, 3, 32, 0.0, batch_first=True, norm_first=norm_first)
    a = transformer.Transformer(16, 4, 2, 3, 32, dropout=0.0, norm_first=norm_first)
    b.load_state_dict(random_state(b))
    a.load_state_dict(b.state_dict())
    expected = b(
        source,
        target,
        tgt_mask=~transformer.causal_mask(7),
        src_key_padding_mask=~keep,
        memory_key_padding_mask=~keep,
    )
    got = a(source, target, transformer.key_mask(keep))
    torch.testing.assert_close(got, expected)
    # what comes later in the target is not seen
    target = target.clone()
    target[:, 4:] = 0
    torch.testing.assert_close(a(source, target, transformer.key_mask(keep))[:, :4], got[:, :4])


@pytest.mark.parametrize(
    ("params", "millions"),
    [({}, 65), ({"dim": 1024, "heads": 16, "mlp_dim": 4096}, 213)],
    ids=["base", "big"],
)
def test_transformers_have_the_paper_s_sizes(params, millions):
    """Table 3, whose counts are rounded, with one matrix of 37,000 words for both embeddings and the last layer."""
    words = 37_000 * params.get("dim", 512) / 1e6
    assert millions_of(transformer.Transformer, **params) + words == pytest.approx(millions, rel=0.03)


def test_base_model_is_that_of_torch():
    a, b = on_meta(transformer.Transformer), on_meta(nn.Transformer)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


def test_positions():
    table = transformer.sinusoids(50, 8)
    assert table[0].tolist() == [0, 1] * 4
    assert float(table[7, 2]) == pytest.approx(torch.sin(torch.tensor(7 / 10000 ** (2 / 8))).item(), abs=1e-6)
    assert float(table[7, 3]) == pytest.approx(torch.cos(torch.tensor(7 / 10000 ** (2 / 8))).item(), abs=1e-6)
    x = torch.zeros(2, 3, 8)
    assert torch.equal(transformer.SinusoidalPositions(8, 50)(x)[1], table[:3])
    learned = transformer.LearnedPositions(8, 4)
    assert torch.equal(learned(x)[0], learned.pos_embedding[0, :3])
    for positions in (learned, transformer.SinusoidalPositions(8, 4)):
        with pytest.raises(ValueError, match="got 5 positions, expected at most 4"):
            positions(torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="expected an even number"):
        transformer.sinusoids(4, 7)


# --- EMA with buffers -------------------------------------------------------------------------------------------------


def test_average_holds_batch_norm_statistics():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    ema = common.BufferEma(net, decay=0.5, use_num_upates=False)
    with torch.no_grad():
        net[1].running_mean.fill_(4.0)
        net[0].bias.fill_(2.0)
    before = ema.get_buffer("0bias").clone()
    ema(net)
    torch.testing.assert_close(ema.get_buffer("1running_mean"), torch.full((2,), 2.0))
    torch.testing.assert_close(ema.get_buffer("0bias"), (before + 2) / 2)
    with ema.swapped(net):
        assert net[1].running_mean.tolist() == [2.0, 2.0]
    assert net[1].running_mean.tolist() == [4.0, 4.0]
