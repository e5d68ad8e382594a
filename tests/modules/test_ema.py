"""LitEma: official numbers and names, precision, and that it always gives the raw weights back."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from tests.reference import compare, filler

FX = compare.load(Path(__file__).parents[1] / "reference" / "fixtures" / "lit_ema.json")
KINDS = {"default": {}, "no_num_updates": {"use_num_upates": False}, "decay_0.5": {"decay": 0.5}}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def walk(model: nn.Module, step: int) -> None:
    """The movement of the fixture."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(0.1 * filler.normal(100, f"step{step}/{n}", p.shape))


def official_run(kind: str) -> tuple[nn.Module, LitEma, dict[str, torch.Tensor]]:
    model = filler.fill(net(), FX["seed"])
    model[2].bias.requires_grad_(False)
    ema, outs = LitEma(model, **KINDS[kind]), {}
    compare.check_keys(ema, FX)
    for step in range(1, 31):
        walk(model, step)
        ema(model)
        if step in (1, 2, 10, 30):
            outs |= {f"{kind}.{step}.{k}": v.clone() for k, v in ema.state_dict().items()}
    return model, ema, outs


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_official_numbers(kind):
    model, ema, outs = official_run(kind)
    ema.copy_to(model)
    outs[f"{kind}.copied"] = model[0].weight
    assert set(outs) == {k for k in FX["outputs"] if k.startswith(f"{kind}.")}
    assert compare.check(FX, outs) == []


def test_loading_a_state_continues_the_warm_up():
    model, ema, _ = official_run("default")
    other = LitEma(model)
    other.load_state_dict(ema.state_dict())
    assigned = LitEma(model)
    assigned.load_state_dict(copy.deepcopy(ema.state_dict()), assign=True)
    copied = copy.deepcopy(ema)
    for step in range(31, 36):
        walk(model, step)
        for e in (ema, other, assigned, copied):
            e(model)
    for e in (other, assigned, copied):
        assert int(e.num_updates) == 35
        for k, v in ema.state_dict().items():
            assert torch.equal(e.state_dict()[k], v), k


def test_warm_up_starts_again():
    model, ema, _ = official_run("default")
    ema.reset_num_updates()
    with torch.no_grad():
        before = ema.get_buffer("0weight").clone()
        model[0].weight.add_(1.0)
    ema(model)
    torch.testing.assert_close(ema.get_buffer("0weight"), before.lerp(model[0].weight, 1 - 2 / 11))


@pytest.mark.parametrize(("decay", "half_life"), [(0.9, 6.578813), (0.999, 692.8005), (0.0, 0.0), (1.0, math.inf)])
def test_ramp_up_of_stylegan2_ada(decay, half_life):
    """beta = 0.5 ** (batch / max(half-life, 1e-8)), half-life = min(its own, 0.05 of the images seen), in images."""
    batch, seen = 32, 0
    model = nn.Linear(3, 1, bias=False)
    ema = LitEma(model, decay=decay, rampup=0.05)
    expected = ema.weight.clone()
    for step in range(1, 300):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema(model)
        beta = 0.5 ** (batch / max(min(batch * half_life, seen * 0.05), 1e-8))
        expected, seen = beta * expected + (1 - beta) * step, seen + batch
        torch.testing.assert_close(ema.weight, expected, rtol=1e-5, atol=1e-6)
    assert int(ema.num_updates) == 299
    again = LitEma(model, decay=decay, rampup=0.05)
    again.load_state_dict(ema.state_dict())
    assert again._next_decay() == pytest.approx(ema._next_decay())


@pytest.mark.parametrize("options", [{"rampup": 0.0}, {"rampup": -1.0}, {"rampup": 0.05, "use_num_upates": False}])
def test_ramp_up_that_cannot_be(options):
    with pytest.raises(ValueError, match=f"got rampup={options['rampup']}"):
        LitEma(net(), **options)


def test_names_that_collide_without_dots():
    model = nn.ModuleDict({"a": nn.Module(), "ab": nn.Module()})
    model["a"].register_parameter("bc", nn.Parameter(torch.zeros(2)))
    model["ab"].register_parameter("c", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"'a\.bc' and 'ab\.c'"):
        LitEma(model)


@pytest.mark.parametrize("name", ["decay", "num_updates", "copy_to"])
def test_names_that_the_average_itself_uses(name):
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2))})
    with pytest.raises(ValueError, match=name):
        LitEma(model)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="expected a value in"):
        LitEma(net(), decay=decay)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_still_moves_the_average(dtype):
    model = net().to(dtype)
    ema = LitEma(model, use_num_upates=False)
    start = ema.get_buffer("0weight").clone()
    assert start.dtype == torch.float32
    with torch.no_grad():
        model[0].weight.add_(0.5)
    for _ in range(10):
        ema(model)
    moved = (ema.get_buffer("0weight") - start) / (model[0].weight.float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**10), rtol=1e-2, atol=0)
    ema.copy_to(model)
    assert model[0].weight.dtype == dtype


def test_a_model_of_two_dtypes():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    ema = LitEma(model, decay=0.5, use_num_upates=False)
    start = {k: v.clone() for k, v in ema.named_buffers()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema(model)
    for name, p in model.named_parameters():
        key = name.replace(".", "")
        torch.testing.assert_close(ema.get_buffer(key), start[key].lerp(p.float(), 0.5))


def test_the_shadow_ignores_half():
    model = net()
    holder = nn.ModuleDict({"model": model, "ema": LitEma(model)}).half()
    assert model[0].weight.dtype == torch.float16
    assert holder["ema"].get_buffer("0weight").dtype == torch.float32
    assert holder["ema"].num_updates.dtype == torch.int32
    assert holder.to("meta")["ema"].get_buffer("0weight").is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_swapped_gives_the_raw_weights_back(dtype, context):
    model = net().to(dtype)
    ema = LitEma(model)
    walk(model, 1)
    raw = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), context(), ema.swapped(model):
        for n, p in model.named_parameters():
            assert torch.equal(p, ema.get_buffer(n.replace(".", "")).to(dtype))
        assert model(torch.randn(2, 5, dtype=dtype)).shape == (2, 3)
        raise RuntimeError("inside")
    assert all(torch.equal(v, raw[k]) for k, v in model.state_dict().items())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 5, dtype=dtype)).sum().backward()
    optimiser.step()
    assert not torch.equal(model[0].weight, raw["0.weight"]), "training goes on"


def test_swapped_leaves_frozen_parameters_alone():
    model = net()
    model[1].requires_grad_(False)
    ema = LitEma(model)
    walk(model, 1)
    frozen = model[1].weight.clone()
    with ema.swapped(model):
        assert torch.equal(model[1].weight, frozen)


def test_store_and_restore():
    model = net()
    ema = LitEma(model)
    walk(model, 1)
    raw = model[0].weight.clone()
    ema.store(model.parameters())
    ema.copy_to(model)
    assert not torch.equal(model[0].weight, raw)
    with pytest.raises(ValueError, match="got 2 parameters, expected the 6"):
        ema.restore(model[0].parameters())
    ema.restore(model.parameters())
    assert torch.equal(model[0].weight, raw)


def test_another_model_is_refused():
    ema = LitEma(net())
    for act in (ema, ema.copy_to):
        with pytest.raises(ValueError, match="without 6 averaged parameters"):
            act(nn.Conv2d(1, 1, 1))


def test_a_step_never_waits_for_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):  # a fake tensor has no value to wait for
        model = net()
        ema = LitEma(model)
        ema(model)
        ema(model)
        with ema.swapped(model):
            assert model(torch.randn(2, 5)).device.type == "cuda"
