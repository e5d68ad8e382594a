"""The official sampler classes against numbers of the official code (fixtures sampler_*, ddim_schedules)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import official
from ldm.diffusion.schedule import make_beta_schedule
from ldm.modules.quantize import VectorQuantizer2
from ldm.modules.unet import UNetModel
from ldm.util import instantiate_from_config
from tests.reference import compare, filler

FIXTURES = Path(compare.__file__).parent / "fixtures"
TRAJECTORIES = sorted(p.stem for p in FIXTURES.glob("sampler_*.json") if p.stem != "sampler_seeded_rng")


class NoisePredictor(nn.Module):
    """The least that a sampler needs: a U-Net under its official name, and the schedule."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        self.num_timesteps = params["timesteps"]
        betas = make_beta_schedule("linear", self.num_timesteps, params["linear_start"], params["linear_end"])
        self.register_buffer("betas", torch.tensor(betas, dtype=torch.float32))
        self.register_buffer("alphas_cumprod", torch.tensor((1 - betas).cumprod(), dtype=torch.float32))
        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(**params["unet_config"]["params"])

    def apply_model(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.model.diffusion_model(x, t, context=c)


@pytest.fixture(scope="module", params=[NoisePredictor, "ldm.models.diffusion.ddpm.LatentDiffusion"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    fx = compare.load(FIXTURES / "sampler_ddim_eta0.json")
    if isinstance(request.param, str):
        module = instantiate_from_config({"target": request.param, "params": fx["params"]})
    else:
        module = request.param(fx["params"])
    return filler.fill(module, fx["seed"]).eval()


def run(model: nn.Module, fx: dict) -> dict[str, Tensor]:
    times, inputs = [], []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        times.append(args[1][0].float())
        inputs.append(args[0][:2])

    x, options = compare.inputs(fx), dict(fx["sampler"])
    if options.pop("masked", False):
        options |= {"mask": (x["mask"] > 0.5).float(), "x0": x["x0"]}
    sampler = getattr(official, fx["target"].rpartition(".")[2])(model)
    hook = model.get_submodule("model.diffusion_model").register_forward_pre_hook(record)
    with compare.fixed_noise(fx["noise_seed"]):
        samples, inter = sampler.sample(
            batch_size=2,
            shape=(4, 8, 8),
            conditioning=x["c"],
            unconditional_conditioning=x["uc"],
            x_T=x["x_T"],
            verbose=False,
            log_every_t=1,
            **options,
        )
    hook.remove()
    outs = {"samples": samples, "model_t": torch.stack(times), "model_x": torch.stack(inputs)}
    if inter is not None:
        outs |= {name: torch.stack(values) for name, values in inter.items()}
    return outs


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(model: nn.Module, name: str) -> None:
    fx = compare.load(FIXTURES / f"{name}.json")
    outs = run(model, fx)
    assert set(fx["outputs"]) <= set(outs)
    assert compare.check(fx, {key: outs[key] for key in fx["outputs"]}) == []


def test_random_numbers_are_drawn_as_often_and_in_the_same_order(model: nn.Module) -> None:
    fx = compare.load(FIXTURES / "sampler_seeded_rng.json")
    x = compare.inputs(fx)
    cases = {
        "ddim_eta0": (official.DDIMSampler, 0.0),
        "ddim_eta1": (official.DDIMSampler, 1.0),
        "plms": (official.PLMSSampler, 0.0),
    }
    for name, (sampler, eta) in cases.items():
        torch.manual_seed(42)
        samples, _ = sampler(model).sample(
            S=5,
            batch_size=2,
            shape=(4, 8, 8),
            conditioning=x["c"],
            unconditional_conditioning=x["uc"],
            unconditional_guidance_scale=3.0,
            eta=eta,
            verbose=False,
        )
        assert compare.check(fx, {name: samples, f"{name}.next_randn": torch.randn(4)}) == []


def test_ddim_schedules(model: nn.Module) -> None:
    fx = compare.load(FIXTURES / "ddim_schedules.json")
    sampler = official.DDIMSampler(model)
    names = {
        "timesteps": "ddim_timesteps",
        "alphas": "ddim_alphas",
        "alphas_prev": "ddim_alphas_prev",
        "sigmas": "ddim_sigmas",
        "sqrt_one_minus_alphas": "ddim_sqrt_one_minus_alphas",
        "sigmas_original": "ddim_sigmas_for_original_num_steps",
    }
    for case in {key.rpartition(".")[0] for key in fx["outputs"]}:
        grid, steps, eta = case.split("_")
        sampler.make_schedule(int(steps), grid, float(eta.removeprefix("eta")), verbose=False)
        outs = {f"{case}.{key}": torch.as_tensor(getattr(sampler, attr)) for key, attr in names.items()}
        assert compare.check(fx, outs) == []


def test_sampling_on_a_schedule_of_ones_own(model: nn.Module) -> None:
    """`sample` is make_schedule and ddim_sampling; `quad` and all T steps can only be had by the two."""
    fx = compare.load(FIXTURES / "sampler_ddim_eta0.json")
    x, shape = compare.inputs(fx), (2, 4, 8, 8)
    for cls, method in ((official.DDIMSampler, "ddim_sampling"), (official.PLMSSampler, "plms_sampling")):
        sampler = cls(model)
        whole = sampler.sample(4, 2, shape[1:], x["c"], x_T=x["x_T"], verbose=False, log_every_t=1)
        sampler.make_schedule(4, verbose=False)
        halves = getattr(sampler, method)(x["c"], shape, x["x_T"], log_every_t=1)
        assert torch.equal(whole[0], halves[0]) and len(halves[1]["pred_x0"]) == 5
        sampler.make_schedule(3, "quad", verbose=False)
        times: list[int] = []
        quad = getattr(sampler, method)(x["c"], shape, x["x_T"], callback=times.append)[0]
        assert times == [0, 1, 2] and not torch.allclose(quad, whole[0])
    sampler = official.DDIMSampler(model)
    sampler.make_schedule(5, verbose=False)
    sampler.ddpm_num_timesteps, times = 3, []
    sampler.ddim_sampling(x["c"], shape, x["x_T"], ddim_use_original_steps=True, callback=times.append)
    assert times == [0, 1, 2]


def test_noise_temperature_dropout_and_score_correction(model: nn.Module) -> None:
    """One step of DDIM with eta 1, written out (DDIM eq. 12), with what official callers can change in it."""
    fx = compare.load(FIXTURES / "sampler_ddim_eta1.json")
    x, abar = compare.inputs(fx), model.alphas_cumprod.double()

    class Corrector:
        def modify_score(self, model, e_t, x, t, c, gain):  # noqa: ANN001, ANN202
            assert t.tolist() == [1, 1] and c is not None
            return gain * e_t

    options = {"x_T": x["x_T"], "eta": 1.0, "verbose": False, "temperature": 0.7, "noise_dropout": 0.25}
    options |= {"score_corrector": Corrector(), "corrector_kwargs": {"gain": 0.5}}
    torch.manual_seed(3)
    found, inter = official.DDIMSampler(model).sample(1, 2, (4, 8, 8), x["c"], **options)
    torch.manual_seed(3)
    noise = torch.nn.functional.dropout(torch.randn(2, 4, 8, 8) * 0.7, 0.25)
    a, a_prev = abar[1], abar[0]
    eps = 0.5 * model.apply_model(x["x_T"], torch.tensor([1, 1]), x["c"]).double()
    x0 = (x["x_T"] - (1 - a).sqrt() * eps) / a.sqrt()
    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    wanted = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps + sigma * noise
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inter["pred_x0"][-1].double(), x0, rtol=1e-4, atol=1e-4)


def test_which_intermediates_are_logged(model: nn.Module) -> None:
    """The first step's, and those at multiples of log_every_t counted from the last one."""
    fx = compare.load(FIXTURES / "sampler_ddim_eta0.json")
    x = compare.inputs(fx)
    counts = []
    for every in (1, 2, 3, 100):
        inter = official.DDIMSampler(model).sample(5, 2, (4, 8, 8), x["c"], verbose=False, log_every_t=every)[1]
        counts.append(len(inter["x_inter"]))
    assert counts == [6, 4, 4, 3]


def test_no_step_count_fails(model: nn.Module) -> None:
    """599 of the counts 1..1000 were an IndexError: the official grid asked for timestep 1000 of 1000."""
    sampler = official.DDIMSampler(model)
    for steps in range(1, 1001):
        sampler.make_schedule(steps, verbose=False)
        assert sampler.ddim_timesteps.max() < 1000
        assert sampler.ddim_sigmas.isfinite().all()


def test_image_to_image_at_any_strength(model: nn.Module) -> None:
    """Strength 1 indexed past the schedule. Decoding all steps is sampling from the encoded image."""
    fx = compare.load(FIXTURES / "sampler_ddim_eta0.json")
    x = compare.inputs(fx)
    sampler = official.DDIMSampler(model)
    sampler.make_schedule(5, verbose=False)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    last = sampler.stochastic_encode(x["x_T"], torch.tensor([4, 4]), noise=noise)
    full = sampler.stochastic_encode(x["x_T"], torch.tensor([5, 5]), noise=noise)
    assert torch.equal(last, full)
    abar = model.alphas_cumprod[801]
    torch.testing.assert_close(last, abar.sqrt() * x["x_T"] + (1 - abar).sqrt() * noise)
    whole = sampler.sample(5, 2, (4, 8, 8), x["c"], x_T=last, verbose=False)[0]
    torch.testing.assert_close(sampler.decode(last, x["c"], 5), whole)
    assert torch.equal(sampler.decode(last, x["c"], 0), last)


def test_quantised_x0_replaces_only_the_signal(model: nn.Module) -> None:
    """DDIM with a codebook: x_s = sqrt(abar_s) code(x0) + the noise part of the unsnapped prediction."""
    codebook = filler.fill(VectorQuantizer2(16, 4, beta=0.25), 1)
    fx = compare.load(FIXTURES / "sampler_ddim_eta0.json")
    x = compare.inputs(fx)
    snapped: list[Tensor] = []
    options = {"x_T": x["x_T"], "verbose": False, "log_every_t": 1}
    plain = official.DDIMSampler(model).sample(2, 2, (4, 8, 8), x["c"], **options)[1]
    first_stage = getattr(model, "first_stage_model", None)
    model.first_stage_model = nn.Module()
    model.first_stage_model.quantize = codebook
    options["img_callback"] = lambda x0, i: snapped.append(x0)
    inter = official.DDIMSampler(model).sample(2, 2, (4, 8, 8), x["c"], quantize_x0=True, **options)[1]
    model.first_stage_model = first_stage
    assert torch.equal(snapped[0], codebook(plain["pred_x0"][1])[0])
    shift = model.alphas_cumprod[1].sqrt() * (snapped[0] - plain["pred_x0"][1])
    torch.testing.assert_close(inter["x_inter"][1], plain["x_inter"][1] + shift)


def test_functions_by_their_official_names() -> None:
    abar = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
    times = official.make_ddim_timesteps("uniform", 50, 1000)
    assert times.tolist() == [*range(1, 1000, 20)]
    sigmas, alphas, alphas_prev = official.make_ddim_sampling_parameters(abar, times, 1.0, verbose=False)
    assert alphas_prev[0] == abar[0] and np.array_equal(alphas_prev[1:], alphas[:-1]) and sigmas.shape == (50,)
    table = official.extract_into_tensor(torch.arange(10.0), torch.tensor([3, 7]), (2, 4, 8, 8))
    assert table.shape == (2, 1, 1, 1) and table.flatten().tolist() == [3.0, 7.0]
    same = official.noise_like((3, 4, 2, 2), "cpu", repeat=True)
    assert torch.equal(same[0], same[2]) and not torch.equal(*official.noise_like((2, 4, 2, 2)))
    betas = official.betas_for_alpha_bar(1000, lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2)
    np.testing.assert_allclose(betas, make_beta_schedule("cosine", 1000), rtol=1e-9)


def test_settings_that_cannot_work(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="eta: got 0.5, expected 0"):
        official.PLMSSampler(model).sample(5, 2, (4, 8, 8), eta=0.5)
    with pytest.raises(ValueError, match="mask: got no x0"):
        official.DDIMSampler(model).sample(5, 2, (4, 8, 8), mask=torch.ones(2, 1, 8, 8), verbose=False)
