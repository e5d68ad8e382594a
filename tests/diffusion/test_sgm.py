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
    assert torch.equal(d.sigma_to_idx(d.sigmas[[3, 700]]), torch.tensor([3, 700]))
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
