"""The U-Nets: official keys, norms and numbers, and every constructor argument."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.modules.layers import ResBlock
from ldm.modules.unet import EncoderUNetModel, SpatialUNetModel, UNetModel
from tests.reference import compare, filler

REFERENCE = Path(__file__).parents[1] / "reference"
FIXTURES = REFERENCE / "fixtures"
CLASSES = {
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNetModel,
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel": EncoderUNetModel,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": SpatialUNetModel,
}
NUMBERS = sorted(p.stem for pattern in ("unet_*", "encoder_unet_*", "sgm_unet_*") for p in FIXTURES.glob(pattern))
PREFIX = "model.diffusion_model."
SMALL = dict(
    image_size=8,
    in_channels=4,
    model_channels=32,
    out_channels=4,
    num_res_blocks=1,
    attention_resolutions=[2],
    channel_mult=[1, 2],
    num_heads=2,
)


def reference(name: str) -> dict:
    return compare.load(FIXTURES / f"{name}.json")


def with_unet(name: str) -> bool:
    return any(k.startswith(PREFIX) for k in reference(name)["keys"])


KEYS = [p.stem for p in sorted(FIXTURES.glob("keys_*")) if with_unet(p.stem)]


def small(**changes) -> UNetModel:
    """A tiny U-Net whose residual branches are not zero."""
    return filler.fill(UNetModel(**{**SMALL, **changes}), 3).eval()


def run(net: nn.Module, batch: int = 2, **cond: Tensor) -> Tensor:
    torch.manual_seed(0)
    return net(torch.randn(batch, 4, 8, 8), torch.arange(batch) * 100, **cond)


def check_norms(net: nn.Module, norms: dict[str, list]) -> None:
    for name, (kind, value, *groups) in norms.items():
        module = net.get_submodule(name)
        assert type(module).__name__ == kind, name
        assert (module.p if kind == "Dropout" else module.eps) == value, name
        assert not groups or module.num_groups == groups[0], name


@pytest.mark.parametrize("name", [n for n in NUMBERS if not n.endswith("gradients")])
def test_official_numbers(name):
    fx = reference(name)
    net = CLASSES[fx["target"]](**fx["params"])
    if fx["keys"]:
        compare.check_keys(net, fx)
        check_norms(net, fx.get("norms", {}))
    filler.fill(net, fx["seed"], fx.get("fill_rules", ())).eval()
    x = compare.inputs(fx)
    assert compare.check(fx, {"out": net(**x)}) == []
    with torch.no_grad():
        assert compare.check(fx, {"out": net(**x)}) == []


@pytest.mark.smoke
def test_official_gradients():
    fx = reference("unet_sd_v1_small_gradients")
    net = filler.fill(UNetModel(**fx["params"]), fx["seed"]).train()
    x = compare.inputs(fx)
    target = x.pop("target")
    x["x"].requires_grad_()
    x["context"].requires_grad_()
    loss = F.mse_loss(net(**x), target)
    loss.backward()
    outs = {f"grad:{n}": p.grad for n, p in net.named_parameters() if f"grad:{n}" in fx["outputs"]}
    outs |= {"loss": loss, "grad:x": x["x"].grad, "grad:context": x["context"].grad}
    outs["grad_norm_all"] = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


@pytest.mark.smoke
@pytest.mark.parametrize("name", KEYS)
def test_official_keys(name):
    fx = reference(name)
    configs = json.loads((REFERENCE / "official_configs.json").read_text())
    params = (configs.get(fx["config"]) or configs[f"sgm/{fx['config']}"])["model"]["params"]
    config = params.get("unet_config") or params["network_config"]
    with torch.device("meta"):
        net = CLASSES[config["target"]](**config["params"])
    compare.check_keys(net, {"keys": {k[len(PREFIX) :]: v for k, v in fx["keys"].items() if k.startswith(PREFIX)}})
    check_norms(net, {k[len(PREFIX) :]: v for k, v in fx["norms"].items() if k.startswith(PREFIX)})


def saved_elements(net: nn.Module, **cond: Tensor) -> int:
    """How many numbers autograd holds for the backward pass, parameters aside."""
    held, params = 0, {p.data_ptr() for p in net.parameters()}

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        held += 0 if t.data_ptr() in params else t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(net, **cond)
    return held


@pytest.mark.parametrize("changes", [{}, {"context_dim": 6, "legacy": False}])
def test_use_checkpoint_holds_less_and_changes_no_gradient(changes, monkeypatch):
    calls = []
    forward = ResBlock._forward
    monkeypatch.setattr(ResBlock, "_forward", lambda self, *args: calls.append(self) or forward(self, *args))
    grads, held, counts = [], [], []
    for use in (False, True):
        net = small(use_checkpoint=use, **changes).train()
        torch.manual_seed(1)
        cond = {"context": torch.randn(2, 3, 6)} if changes else {}
        held.append(saved_elements(net, **cond))
        calls.clear()
        run(net, **cond).square().sum().backward()
        counts.append(len(calls))
        grads.append({n: p.grad for n, p in net.named_parameters()})
    assert held[1] < 0.4 * held[0]
    assert counts[1] == 2 * counts[0], "every block is computed again, and none without the option"
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, msg=n)
    calls.clear()
    with torch.no_grad():
        run(net, **cond)
    assert len(calls) == counts[0], "nothing to compute again without gradients"


def test_use_fp16_runs_the_trunk_in_half():
    net, half = small(), small(use_fp16=True)
    assert half.dtype == torch.float16 and half.time_embed[0].weight.dtype == torch.float32
    with torch.no_grad():
        want, got = run(net), run(half)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        half.convert_to_fp32()
        assert half.dtype == torch.float32
        torch.testing.assert_close(run(half), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_as_a_whole_takes_and_gives_any_dtype(dtype):
    context = torch.randn(2, 3, 6)
    net = small(context_dim=6, num_classes=5)
    y = torch.tensor([1, 4])
    with torch.no_grad():
        want, got = run(net, context=context, y=y), run(net.to(dtype), context=context, y=y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_autocast():
    net = small(context_dim=6)
    context = torch.randn(2, 3, 6)
    want = run(net, context=context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(net, context=context)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("conv_resample", [True, False])
def test_three_dimensions_keep_their_depth(resblock_updown, conv_resample):
    net = small(dims=3, resblock_updown=resblock_updown, conv_resample=conv_resample)
    x = torch.randn(1, 4, 3, 8, 4)
    assert net(x, torch.tensor([7])).shape == x.shape


@pytest.mark.parametrize(
    "kind, y, keys",
    [
        (5, torch.tensor([0, 4]), {"label_emb.weight": [5, 128]}),
        ("continuous", torch.rand(2, 1), {"label_emb.weight": [128, 1]}),
        ("timestep", torch.tensor([3.0, 4.0]), {"label_emb.1.0.weight": [128, 32], "label_emb.1.2.weight": [128, 128]}),
        ("sequential", torch.randn(2, 7), {"label_emb.0.0.weight": [128, 7], "label_emb.0.2.weight": [128, 128]}),
    ],
)
def test_every_kind_of_label(kind, y, keys):
    net = small(num_classes=kind, adm_in_channels=7)
    state = {
        k: list(v.shape) for k, v in net.state_dict().items() if k.startswith("label_emb") and k.endswith("weight")
    }
    assert state == keys
    assert not torch.allclose(run(net, y=y), run(net, y=y.flip(0)))
    for wrong in (None, y[:1], y[..., None]):
        with pytest.raises(ValueError, match="got y of shape"):
            run(net, y=wrong)


def test_a_label_that_nobody_asked_for():
    with pytest.raises(ValueError, match="num_classes=None"):
        run(small(), y=torch.tensor([0, 1]))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_only(training):
    net = small(dropout=0.5).train(training)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    assert torch.equal(net(x, t), net(x, t)) != training


def test_a_new_network_predicts_zero():
    assert (run(UNetModel(**SMALL)) == 0).all()


def test_memory_formats_change_no_number_and_come_back():
    net = small(context_dim=6)
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 3, 6)
    assert net.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = net(x, t, context)
        assert want.is_contiguous()
        out = net(x.contiguous(memory_format=torch.channels_last), t, context)
        assert out.is_contiguous(memory_format=torch.channels_last)
        net.to(memory_format=torch.contiguous_format)
        again = net(x, t, context)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-5)


def test_one_timestep_for_all():
    net = small()
    x = torch.randn(2, 4, 8, 8)
    want = net(x, torch.tensor([7, 7]))
    assert torch.equal(net(x, torch.tensor([7])), want)
    assert torch.equal(net(x, torch.tensor(7)), want)


def test_an_image_does_not_depend_on_its_batch():
    net = small(model_channels=64)
    torch.manual_seed(0)
    x, t = torch.randn(5, 4, 8, 8), torch.arange(5) * 100
    with torch.no_grad():
        torch.testing.assert_close(net(x, t)[3:4], net(x[3:4], t[3:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x, timesteps, message",
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), r"got x \[2, 3, 8, 8\], expected \[B, 4\]"),
        (torch.zeros(4, 8, 8), torch.zeros(4), "2 spatial sizes"),
        (torch.zeros(2, 4, 8, 7), torch.zeros(2), "expected sizes that 2 divides"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(3), r"got timesteps of shape \[3\], expected \[2\]"),
        (torch.zeros(2, 4, 8, 8), None, "got timesteps of shape None"),
    ],
)
def test_wrong_inputs_are_named(x, timesteps, message):
    with pytest.raises(ValueError, match=message):
        small()(x, timesteps)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": -1}, "expected one of them"),
        ({"dims": 4}, "dims=4"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_head_channels": 128}, "too few"),
        ({"num_head_channels": 128, "context_dim": 6}, "too few"),
        ({"transformer_depth": [1, 2, 3], "context_dim": 6}, "expected one value or 2"),
        ({"num_res_blocks": [1]}, "expected one value or 2"),
        ({"num_classes": "sequential"}, "adm_in_channels"),
        ({"num_classes": "other"}, "num_classes='other'"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetModel(**{**SMALL, **changes})


def test_heads_follow_the_official_rules():
    def heads(**changes) -> list[tuple[int, int]]:
        net = UNetModel(**{**SMALL, "context_dim": 6, "model_channels": 32, "channel_mult": [1, 3], **changes})
        attn = net.middle_block[1].transformer_blocks[0].attn1
        return [(attn.heads, attn.to_q.out_features // attn.heads)]

    assert heads() == [(2, 48)]
    assert heads(num_head_channels=64) == [(1, 96)], "legacy: all channels, in as many heads as would fit"
    assert heads(num_head_channels=64, legacy=False) == [(1, 64)]
    net = UNetModel(**{**SMALL, "num_heads_upsample": 4})
    assert [net.input_blocks[3][1].num_heads, net.middle_block[1].num_heads, net.output_blocks[0][1].num_heads] == [
        2,
        2,
        4,
    ]


def test_channel_mult_that_does_not_start_at_one():
    assert run(small(channel_mult=[2, 2], n_embed=7)).shape == (2, 7, 8, 8)


def test_options_of_generative_models():
    net = SpatialUNetModel(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        attention_resolutions=[1, 2],
        num_res_blocks=[1, 2],
        channel_mult=[1, 2],
        num_head_channels=16,
        context_dim=[6, 6],
        transformer_depth=[1, 2],
        disable_self_attentions=[False, True],
        num_attention_blocks=[0, 1],
        disable_middle_self_attn=True,
        spatial_transformer_attn_type="softmax-xformers",
    )
    attention = [i for i, block in enumerate(net.input_blocks) if len(block) == 2]
    assert attention == [3], "level 0 has none, level 1 has one of two"
    blocks = net.input_blocks[3][1].transformer_blocks
    assert [b.attn1.to_k.in_features for b in blocks] == [6, 6]
    assert run(net, context=torch.randn(2, 3, 6)).shape == (2, 4, 8, 8)
    net = UNetModel(**SMALL, disable_middle_transformer=True)
    assert isinstance(net.middle_block[1], nn.Identity) and run(net).shape == (2, 4, 8, 8)


def test_generative_models_always_use_transformers():
    toy = json.loads((REFERENCE / "official_configs.json").read_text())
    config = toy["sgm/configs/example_training/toy/mnist_cond.yaml"]["model"]["params"]["network_config"]
    net = CLASSES[config["target"]](**config["params"])
    assert "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in net.state_dict()
    out = net(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), y=torch.randn(2, 128))
    assert out.shape == (2, 1, 8, 8)
    with pytest.raises(TypeError, match="no_such_option"):
        SpatialUNetModel(4, 32, 4, 1, [], num_heads=1, no_such_option=1)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_encoder_pools(pool):
    params = {**SMALL, "num_head_channels": 16, "out_channels": 6, "pool": pool}
    net = filler.fill(EncoderUNetModel(**params), 3).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    want = net(x, t)
    assert want.shape == (2, 6) and want.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(net(x, t), want, rtol=1e-4, atol=1e-5)
        half = filler.fill(EncoderUNetModel(**params, use_fp16=True), 3).eval()
        torch.testing.assert_close(half(x, t), want, rtol=0.02, atol=0.02)
    expected = {"adaptive": "out.3.weight", "attention": "out.2.positional_embedding", "spatial": "out.2.weight"}
    assert expected.get(pool, "out.3.weight") in net.state_dict()


def test_encoder_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="pool='other'"):
        EncoderUNetModel(**SMALL, pool="other")
    with pytest.raises(ValueError, match="num_head_channels"):
        EncoderUNetModel(**SMALL, pool="attention")


def test_it_runs_on_a_device_that_is_not_here():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        net = UNetModel(**SMALL, context_dim=6, num_classes=5)
        y = torch.zeros(2, dtype=torch.long)
        out = net(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 3, 6), y)
        assert out.device.type == "cuda" and out.shape == (2, 4, 8, 8)
        assert EncoderUNetModel(**SMALL)(torch.randn(2, 4, 8, 8), torch.zeros(2)).device.type == "cuda"
