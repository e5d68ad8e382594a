"""DPM-Solver's own interface: schedules, the wrapper around a network, and the order of every update."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.diffusion.dpm_schedule import NoiseScheduleVP, interpolate_fn, model_wrapper
from ldm.diffusion.dpm_solver import SKIP_TYPES, DPM_Solver
from ldm.diffusion.schedule import make_beta_schedule
from ldm.util import get_obj_from_str
from tests.reference import compare

OFFICIAL = "ldm.models.diffusion.dpm_solver.dpm_solver"
X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 1, 2, 2)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Orders are read from differences that float32 would round away."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def abar() -> Tensor:
    return torch.tensor((1 - make_beta_schedule("linear", 1000, 0.00085, 0.012)).cumprod())


SCHEDULES = {
    "discrete": lambda: NoiseScheduleVP("discrete", alphas_cumprod=abar()),
    "linear": lambda: NoiseScheduleVP("linear"),
    "cosine": lambda: NoiseScheduleVP("cosine"),
}


class Mixture:
    """Exact noise prediction where the data are two Gaussians."""

    def __init__(self, schedule: NoiseScheduleVP) -> None:
        self.schedule, self.calls = schedule, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        assert t.shape == (len(x),)
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (self.schedule.marginal_alpha, self.schedule.marginal_std))
        means, std = torch.tensor([-1.0, 0.5]), 0.4
        variance = (alpha * std) ** 2 + sigma**2
        gap = x[..., None] - alpha[..., None] * means
        share = (-(gap**2) / (2 * variance[..., None])).softmax(-1)
        return sigma / variance * (share * gap).sum(-1)


def solve(schedule: NoiseScheduleVP, predict_x0: bool, **options: object) -> tuple[Tensor, int]:
    model = Mixture(schedule)
    return DPM_Solver(model, schedule, predict_x0).sample(X, t_start=0.8, t_end=0.2, **options), model.calls


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_and_time_are_inverse(name: str) -> None:
    schedule = SCHEDULES[name]()
    t = torch.linspace(0.01, schedule.T, 50)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.marginal_lambda(t)), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.marginal_alpha(t) ** 2 + schedule.marginal_std(t) ** 2, torch.ones(50))
    assert (schedule.marginal_lambda(t).diff() < 0).all()


def test_the_discrete_schedule_is_the_table() -> None:
    schedule, table = SCHEDULES["discrete"](), abar()
    times = torch.tensor([1, 500, 1000]) / 1000
    torch.testing.assert_close(schedule.marginal_alpha(times) ** 2, table[[0, 499, 999]])
    betas = torch.tensor(make_beta_schedule("linear", 1000, 0.00085, 0.012))
    torch.testing.assert_close(NoiseScheduleVP("discrete", betas=betas).log_alpha_array, schedule.log_alpha_array)
    with pytest.raises(ValueError, match="neither betas nor alphas_cumprod"):
        NoiseScheduleVP()
    with pytest.raises(ValueError, match="got 'sqrt', expected one of discrete, linear, cosine"):
        NoiseScheduleVP("sqrt")


def test_interpolation_continues_the_outer_pieces() -> None:
    xp, yp = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 2.0, 3.0]])
    x = torch.tensor([[-1.0], [0.0], [0.5], [1.0], [2.0], [3.0], [5.0]])
    assert interpolate_fn(x, xp, yp)[:, 0].tolist() == [-2.0, 0.0, 1.0, 2.0, 2.5, 3.0, 4.0]


# --- the network ------------------------------------------------------------------------------------------------------


def test_every_kind_of_network_predicts_the_same_noise() -> None:
    schedule = SCHEDULES["discrete"]()
    noise, t = Mixture(schedule), torch.tensor([0.3])
    alpha, sigma = schedule.marginal_alpha(t), schedule.marginal_std(t)
    eps = noise(X, t.expand(3))
    x0 = (X - sigma * eps) / alpha
    outs = {"noise": eps, "x_start": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    times = []
    for kind, out in outs.items():
        wrapped = model_wrapper(lambda x, t, out=out: times.append(t) or out, schedule, kind)
        torch.testing.assert_close(wrapped(X, t), eps)
    torch.testing.assert_close(times[0], torch.full((3,), 299.0))  # of a table of 1000, whatever t's shape
    with pytest.raises(ValueError, match="model_type"):
        model_wrapper(lambda x, t: x, schedule, "eps")


def test_guidance_with_and_without_a_classifier() -> None:
    schedule, t = SCHEDULES["linear"](), torch.full((3,), 0.4)

    def net(x: Tensor, t: Tensor, c: Tensor, gain: float) -> Tensor:
        return gain * x + c.reshape(-1, 1, 1, 1)

    options = {"model_kwargs": {"gain": 0.5}, "guidance_type": "classifier-free", "condition": torch.ones(3)}
    free = model_wrapper(net, schedule, **options, unconditional_condition=torch.zeros(3), guidance_scale=3.0)
    torch.testing.assert_close(free(X, t), 0.5 * X + 3.0)
    torch.testing.assert_close(model_wrapper(net, schedule, **options)(X, t), 0.5 * X + 1.0)

    def log_prob(x: Tensor, t: Tensor, c: Tensor, width: float) -> Tensor:
        return -((x - c) ** 2 / (2 * width)).flatten(1).sum(1)

    by_classifier = model_wrapper(
        lambda x, t: 0.5 * x, schedule, guidance_type="classifier", condition=2.0, guidance_scale=0.1,
        classifier_fn=log_prob, classifier_kwargs={"width": 4.0},
    )  # fmt: skip
    with torch.no_grad():
        found = by_classifier(X, t)
    torch.testing.assert_close(found, 0.5 * X - 0.1 * schedule.marginal_std(t)[0] * (2.0 - X) / 4.0)
    with pytest.raises(ValueError, match="no classifier_fn"):
        model_wrapper(net, schedule, guidance_type="classifier")


# --- solvers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    options = {"steps": 600, "order": 3, "method": "singlestep_fixed", "skip_type": "logSNR"}
    return {name: solve(make(), False, **options)[0] for name, make in SCHEDULES.items()}


@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_converges_at_its_order(
    order: int, solver_type: str, predict_x0: bool, exact: dict[str, Tensor]
) -> None:
    options = {"method": "singlestep_fixed", "order": order, "solver_type": solver_type, "skip_type": "logSNR"}
    errors = []
    for steps in (24, 48):
        x, calls = solve(SCHEDULES["linear"](), predict_x0, steps=steps, **options)
        assert calls == steps
        errors.append(float((x - exact["linear"]).abs().max()))
    assert order - 0.4 < math.log2(errors[0] / errors[1]) < order + 0.6


@functools.cache
def trajectory(h: float) -> tuple[list[Tensor], list[Tensor]]:
    """Four times that are h apart in lambda, and the exact states there."""
    schedule, x, states = SCHEDULES["linear"](), X, []
    now = float(schedule.marginal_lambda(torch.tensor([0.5])))
    times = schedule.inverse_lambda(torch.tensor([now - 2 * h, now - h, now, now + h]))
    solver = DPM_Solver(Mixture(schedule), schedule)
    for start, end in zip([0.8, *times[:-1].tolist()], times.tolist(), strict=True):
        x = solver.sample(x, 60, start, end, 3, "logSNR", "singlestep_fixed")
        states.append(x)
    return list(times.unbind()), states


@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_from_a_known_past_errs_at_its_order(order: int, solver_type: str, predict_x0: bool) -> None:
    """One step is wrong by h^(order + 1); a whole solution is not, since its first steps have lower orders.

    The authors' order 3 weighs the second derivative by half, so its step is wrong by h^3 too, but by less.
    """
    schedule, errors = SCHEDULES["linear"](), []
    solver = DPM_Solver(Mixture(schedule), schedule, predict_x0)
    for h in (0.1, 0.05):
        times, states = trajectory(h)
        past = [t.expand(3) for t in times[:3]]
        models = [solver.model_fn(x, t) for x, t in zip(states[:3], past, strict=True)]
        last = solver.multistep_dpm_solver_update(states[2], models, past, times[3].expand(3), order, solver_type)
        errors.append(float((last - states[3]).abs().max()))
    wanted = min(order, 2) + 1
    assert wanted - 0.5 < math.log2(errors[0] / errors[1]) < wanted + 0.7
    if order == 3:
        second = solver.multistep_dpm_solver_update(states[2], models, past, times[3].expand(3), 2, solver_type)
        assert errors[1] < 0.7 * float((second - states[3]).abs().max())


@pytest.mark.parametrize("skip_type", SKIP_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_every_grid_leads_there(method: str, name: str, skip_type: str, exact: dict[str, Tensor]) -> None:
    x, _ = solve(SCHEDULES[name](), True, steps=60, order=2, method=method, skip_type=skip_type)
    torch.testing.assert_close(x, exact[name], rtol=0, atol=3e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [6, 7, 8])
def test_singlestep_uses_the_calls_that_it_is_given(steps: int, order: int) -> None:
    schedule = SCHEDULES["linear"]()
    for skip_type in SKIP_TYPES:
        assert solve(schedule, True, steps=steps, order=order, method="singlestep", skip_type=skip_type)[1] == steps
    times, orders = DPM_Solver(Mixture(schedule), schedule).get_orders_and_timesteps_for_singlestep_solver(
        steps, order, "time_uniform", 0.9, 0.1, "cpu"
    )
    assert sum(orders) == steps and max(orders) == order and len(times) == len(orders) + 1
    torch.testing.assert_close(times[[0, -1]], torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_keep_the_tolerance(order: int, exact: dict[str, Tensor]) -> None:
    schedule, calls = SCHEDULES["linear"](), []
    for tolerance in (1e-2, 1e-4):
        x, n = solve(schedule, False, order=order, method="adaptive", atol=tolerance, rtol=tolerance)
        assert float((x - exact["linear"]).abs().max()) < 10 * tolerance
        calls.append(n)
    assert calls[0] < calls[1]
    with pytest.raises(ValueError, match="order: got 1, expected one of 2, 3"):
        solve(schedule, False, order=1, method="adaptive")


def test_few_multisteps_end_in_lower_orders() -> None:
    schedule = SCHEDULES["linear"]()
    for steps, differ in ((14, True), (15, False)):
        options = {"steps": steps, "order": 2, "method": "multistep"}
        a, b = (solve(schedule, True, lower_order_final=lower, **options)[0] for lower in (True, False))
        assert bool((a != b).any()) == differ
    with pytest.raises(ValueError, match="steps: got 2, expected at least the order 3"):
        solve(schedule, True, steps=2, order=3, method="multistep")


def test_thresholding_and_the_step_to_zero() -> None:
    schedule, t = SCHEDULES["linear"](), torch.full((3,), 0.3)
    solver = DPM_Solver(Mixture(schedule), schedule, True, thresholding=True, max_val=0.5)
    plain = DPM_Solver(Mixture(schedule), schedule, True).model_fn(3 * X, t)
    bound = torch.quantile(plain.abs().flatten(1), 0.995, dim=1).clamp(min=0.5).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(solver.model_fn(3 * X, t), (plain / bound).clamp(-1, 1))
    options = {"steps": 4, "order": 1, "method": "multistep"}
    x, _ = solve(schedule, True, **options)
    last, calls = solve(schedule, True, denoise_to_zero=True, **options)
    end = DPM_Solver(Mixture(schedule), schedule).data_prediction_fn(x, torch.full((3,), 0.2))
    torch.testing.assert_close(last, end)
    assert calls == 5
    with pytest.raises(ValueError, match="method"):
        solve(schedule, True, method="ancestral")


# --- official names and numbers ---------------------------------------------------------------------------------------


def test_the_official_call_gives_the_official_times() -> None:
    """What DPMSolverSampler of the official code does, spelled out with the names of its file."""
    torch.set_default_dtype(torch.float32)
    schedule_class, wrap, solver_class = (
        get_obj_from_str(f"{OFFICIAL}.{name}") for name in ("NoiseScheduleVP", "model_wrapper", "DPM_Solver")
    )
    fx = compare.load(Path(compare.__file__).parent / "fixtures/sampler_dpm_solver_5.json")
    schedule, times = schedule_class("discrete", alphas_cumprod=abar().float()), []

    def net(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        times.append(t[0])
        return 0.1 * x

    model_fn = wrap(net, schedule, guidance_type="classifier-free", condition=torch.zeros(2, 1))
    solver = solver_class(model_fn, schedule, predict_x0=True, thresholding=False)
    x = solver.sample(torch.ones(2, 1, 1, 1), 5, skip_type="time_uniform", method="multistep", order=2)
    assert compare.check(fx, {"model_t": torch.stack(times)}) == []
    assert x.isfinite().all()
