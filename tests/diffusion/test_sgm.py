"""The sgm classes against numbers of generative-models (fixtures sgm_*)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import sgm
from ldm.modules.unet import SpatialUNetModel
from ldm.util import instantiate_from_config
from tests.reference import compare, filler

FIXTURES = Path(compare.__file__).parent / "fixtures"
LEGACY = {"target": "ldm.diffusion.sgm.LegacyDDPMDiscretization"}


def load(name: str) -> dict:
    return compare.load(FIXTURES / f"{name}.json")


def denoiser(scaling: str) -> sgm.DiscreteDenoiser:
    return sgm.DiscreteDenoiser({"target": f"ldm.diffusion.sgm.{scaling}"}, 1000, LEGACY)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    fx = load("sgm_denoiser")
    return sgm.OpenAIWrapper(filler.fill(SpatialUNetModel(**fx["params"]), fx["seed"]).eval())


@torch.no_grad()
def test_denoiser(network: nn.Module) -> None:
    fx = load("sgm_denoiser")
    x = compare.inputs(fx, 304)
    cond = {"crossattn": x["c"], "vector": x["y"]}
    outs = {s: denoiser(s)(network, x["x"], torch.tensor([0.5, 9.0]), cond) for s in ("EpsScaling", "VScaling")}
    assert compare.check(fx, outs) == []


def test_table_of_noise_levels() -> None:
    fx = load("sgm_denoiser")
    d = denoiser("EpsScaling")
    assert compare.check(fx, {"sigmas": d.sigmas, "idx_to_sigma": d.idx_to_sigma(torch.tensor([0, 500, 999]))}) == []
    assert compare.check(fx, {"sigma_to_idx": d.sigma_to_idx(torch.tensor([0.01, 0.5, 3.3, 15.0, 100.0]))}) == []
    assert list(d.state_dict()) == ["sigmas"]


def test_discretization_scaling_and_weighting() -> None:
    fx = load("sgm_discretization_and_scaling")
    sigma = compare.inputs(fx)["sigma"].exp()
    outs: dict[str, Tensor] = {"legacy_flip_no_zero": sgm.LegacyDDPMDiscretization()(1000, False, flip=True)}
    for n in (5, 10, 25, 50, 1000):
        outs[f"legacy_ddpm_{n}"] = sgm.LegacyDDPMDiscretization()(n)
        outs[f"edm_{n}"] = sgm.EDMDiscretization()(n)
    for name in ("EDMScaling", "EpsScaling", "VScaling", "VScalingWithEDMcNoise"):
        parts = zip(("c_skip", "c_out", "c_in", "c_noise"), getattr(sgm, name)()(sigma), strict=True)
        outs |= {f"{name}.{part}": value for part, value in parts}
    for name in ("UnitWeighting", "EDMWeighting", "VWeighting", "EpsWeighting"):
        outs[name] = getattr(sgm, name)()(sigma)
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(p.stem for p in FIXTURES.glob("sgm_sampler_*.json")))
def test_sampler(network: nn.Module, name: str) -> None:
    fx = load(name)
    x = compare.inputs(fx, 305)
    d = denoiser("EpsScaling")
    sigmas, inputs = [], []

    def record(x: Tensor, sigma: Tensor, cond: sgm.Cond) -> Tensor:
        sigmas.append(sigma[0])
        inputs.append(x[:2])
        return d(network, x, sigma, cond)

    config = {
        "target": f"ldm.diffusion.sgm.{fx['target'].rpartition('.')[2]}",
        "params": {
            **fx["sampler"],
            "discretization_config": LEGACY,
            "guider_config": {"target": "ldm.diffusion.sgm.VanillaCFG", "params": {"scale": 5.0}},
        },
    }
    cond, uc = {"crossattn": x["c"], "vector": x["y"]}, {"crossattn": x["uc"], "vector": x["uy"]}
    with compare.fixed_noise(fx["noise_seed"]):
        samples = instantiate_from_config(config)(record, x["x"], cond, uc)
    outs = {"samples": samples, "model_sigma": torch.stack(sigmas), "model_x": torch.stack(inputs)}
    assert compare.check(fx, outs) == []


@torch.no_grad()
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_loss(network: nn.Module, loss_type: str) -> None:
    fx = load("sgm_loss")
    x = compare.inputs(fx, 306)
    d = denoiser("EpsScaling")
    sampler = {"target": "ldm.diffusion.sgm.DiscreteSampling"}
    sampler["params"] = {"discretization_config": LEGACY, "num_idx": 1000}
    loss = sgm.StandardDiffusionLoss(sampler, {"target": "ldm.diffusion.sgm.EpsWeighting"}, loss_type)
    loss.sigma_sampler = lambda n: d.sigmas[[100, 800]]
    with compare.fixed_noise(306):
        value = loss._forward(network, d, {"crossattn": x["c"], "vector": x["y"]}, x["x"], {})
    assert compare.check(fx, {loss_type: value}) == []


def exact(x: Tensor, sigma: Tensor, cond: sgm.Cond) -> Tensor:
    """Denoiser of N(cond, 0.25) data."""
    s = sigma.view(-1, 1, 1, 1)
    return cond["mean"] + 0.25 / (0.25 + s**2) * (x - cond["mean"])


@pytest.mark.parametrize(
    "name",
    [
        "EulerEDMSampler",
        "HeunEDMSampler",
        "EulerAncestralSampler",
        "DPMPP2SAncestralSampler",
        "DPMPP2MSampler",
        "LinearMultistepSampler",
    ],
)
def test_every_sampler_makes_the_data(name: str) -> None:
    torch.manual_seed(0)
    sampler = getattr(sgm, name)(discretization_config={"target": "ldm.diffusion.sgm.EDMDiscretization"}, num_steps=3)
    x = torch.randn(4, 3, 32, 32)
    before = x.clone()
    out = sampler(exact, x, {"mean": 0.7}, num_steps=300)
    assert torch.equal(x, before)
    assert out.mean() == pytest.approx(0.7, abs=0.03) and out.std() == pytest.approx(0.5, abs=0.03)


def test_guidance() -> None:
    guider = sgm.VanillaCFG(3.0)
    x, s = torch.randn(2, 1, 2, 2), torch.tensor([1.0, 2.0])
    c, uc = {"vector": torch.ones(2, 5), "num_frames": 4}, {"vector": torch.zeros(2, 5), "num_frames": 4}
    inputs, sigmas, both = guider.prepare_inputs(x, s, c, uc)
    assert torch.equal(sigmas, torch.tensor([1.0, 2.0, 1.0, 2.0])) and both["num_frames"] == 4
    assert torch.equal(both["vector"][:2], uc["vector"]) and torch.equal(both["vector"][2:], c["vector"])
    out = torch.randn(4, 1, 2, 2)
    torch.testing.assert_close(guider(out, s), out[:2] + 3 * (out[2:] - out[:2]))
    assert sgm.IdentityGuider().prepare_inputs(x, s, c, uc) == (x, s, c)
    assert inputs.shape == (4, 1, 2, 2)


def test_noise_levels_for_training() -> None:
    torch.manual_seed(0)
    log_sigma = sgm.EDMSampling(-1.0, 0.5)(20_000).log()
    assert log_sigma.mean() == pytest.approx(-1, abs=0.02) and log_sigma.std() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(sgm.EDMSampling()(2, torch.zeros(2)), torch.full((2,), -1.2).exp())
    discrete = sgm.DiscreteSampling(LEGACY, 1000)
    assert torch.isin(discrete(100), denoiser("EpsScaling").sigmas).all()
    assert torch.equal(discrete(2, torch.tensor([0, 999])), denoiser("EpsScaling").sigmas[[0, 999]])
    assert torch.equal(sgm.ZeroSampler()(3), torch.full((3,), 1e-5))


def test_offset_noise_and_named_inputs() -> None:
    """Offset noise is constant over each channel (the original raised: it read an attribute that nobody set)."""
    seen: dict[str, Tensor] = {}

    def denoise(network: object, x: Tensor, sigma: Tensor, cond: sgm.Cond, **extra: Tensor) -> Tensor:
        seen.update(extra, x=x, sigma=sigma)
        return x

    torch.manual_seed(0)
    loss = sgm.StandardDiffusionLoss(
        {"target": "ldm.diffusion.sgm.EDMSampling"},
        {"target": "ldm.diffusion.sgm.UnitWeighting"},
        offset_noise_level=10.0,
        batch2model_keys="frames",
    )
    x0, frames = torch.zeros(2, 3, 32, 32), torch.arange(2)
    value = loss(None, denoise, lambda batch: {}, x0, {"frames": frames, "other": 1})
    noise = seen["x"] / seen["sigma"].view(2, 1, 1, 1)
    assert (noise.mean((2, 3)).abs() > 0.5).any() and noise.std((2, 3)) == pytest.approx(torch.ones(2, 3), abs=0.1)
    assert torch.equal(seen["frames"], frames) and "other" not in seen
    torch.testing.assert_close(value, seen["x"].pow(2).mean((1, 2, 3)))


def test_perceptual_loss_type() -> None:
    config = {"target": "ldm.diffusion.sgm.UnitWeighting"}
    with pytest.raises(ValueError, match="loss_type: got 'huber', expected l2, l1 or lpips"):
        sgm.StandardDiffusionLoss({"target": "ldm.diffusion.sgm.EDMSampling"}, config, "huber")


def test_concat_condition_and_edm_preconditioning() -> None:
    seen: dict[str, Tensor] = {}

    class Net(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None) -> Tensor:
            seen.update(x=x, t=timesteps)
            return x[:, :3]

    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    config = {"target": "ldm.diffusion.sgm.EDMScaling", "params": {"sigma_data": 1.0}}
    sgm.Denoiser(config)(sgm.OpenAIWrapper(Net()), x, sigma, {"concat": torch.ones(2, 1, 4, 4)})
    c_in = (sigma**2 + 1).rsqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(seen["x"], torch.cat([x * c_in, torch.ones(2, 1, 4, 4)], 1))
    torch.testing.assert_close(seen["t"], sigma.log() / 4)
    assert sgm.IdentityWrapper(nn.Linear(2, 2)).state_dict().keys() == {
        "diffusion_model.weight",
        "diffusion_model.bias",
    }


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_steps: got None"):
        sgm.DPMPP2MSampler(LEGACY)(exact, torch.zeros(1, 1, 2, 2), {"mean": 0.0})
    with pytest.raises(ValueError, match="got 1001, expected at most 1000"):
        sgm.LegacyDDPMDiscretization()(1001)
