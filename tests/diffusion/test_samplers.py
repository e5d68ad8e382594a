"""Every sampler against data whose denoiser is known exactly (oracle.py), on every kind of path."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    euler_ancestral,
    heun,
    lms,
    unipc,
)
from ldm.diffusion.schedule import (
    GRIDS,
    OFFICIAL_GRIDS,
    Path,
    VEPath,
    VPPath,
    ddpm_buffers,
    make_beta_schedule,
    make_grid,
)
from tests.diffusion.oracle import PATHS, SPANS, Mixture, cosine_path, no_noise, vp_path, zero_snr_path

DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.stochastic]
STOCHASTIC = [name for name, row in SAMPLERS.items() if row.stochastic]
X = torch.linspace(-2, 2, 9, dtype=torch.float64)
HARD: dict[str, Path] = {**PATHS, "cosine": cosine_path(), "zero_snr": zero_snr_path()}


class Noise:
    """Seeded noise that counts its calls."""

    def __init__(self) -> None:
        self.generator, self.calls = torch.Generator().manual_seed(0), 0

    def __call__(self, like: Tensor) -> Tensor:
        self.calls += 1
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def orders(errors: list[float]) -> list[float]:
    return [math.log2(abs(a / b)) for a, b in zip(errors, errors[1:], strict=False)]


def start_of(path: Path, grid: Tensor) -> Tensor:
    return X * (path.alpha(grid[0]) ** 2 * 0.9 + path.sigma(grid[0]) ** 2).sqrt()


# ------------------------------------------------------------------------------------------------------ convergence


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    """The solution of the probability-flow ODE on each path: Heun on two fine grids, extrapolated to h = 0."""
    solutions = {}
    for name, path in PATHS.items():
        runs = []
        for n in (500, 1000):
            grid = make_grid("exponential", path, n, t_start=SPANS[name][0], t_end=SPANS[name][1])
            runs.append(heun(Mixture(path), start_of(path, grid), grid, path=path, randn=no_noise))
        solutions[name] = (4 * runs[1] - runs[0]) / 3
    return solutions


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "knobs"),
    [(name, {}) for name in DETERMINISTIC]
    + [
        ("dpmpp_2m", {"lower_order_final": False}),
        ("dpmpp_2m_sde", {"eta": 0.0}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}),
        ("unipc", {"order": 1}),
        ("unipc", {"order": 3}),
        ("lms", {"order": 2}),
    ],
)
def test_order_of_convergence(exact: dict[str, Tensor], path: str, name: str, knobs: dict) -> None:
    p, errors = PATHS[path], []
    for n in (40, 80, 160):
        grid = make_grid("exponential", p, n, t_start=SPANS[path][0], t_end=SPANS[path][1])
        x = SAMPLERS[name](Mixture(p), start_of(p, grid), grid, path=p, randn=no_noise, **knobs)
        errors.append((x - exact[path]).abs().max().item())
    order = SAMPLERS[name].order
    highest = order + (1.3 if name == "lms" else 0.25)  # lms starts at order 4 and falls to 2, that of its first step
    assert all(order - 0.2 < o < highest for o in orders(errors)), orders(errors)


class OneHot:
    """The k-th draw is the k-th unit vector: one run of a linear sampler gives the weight of every draw."""

    def __init__(self) -> None:
        self.k = 0

    def __call__(self, like: Tensor) -> Tensor:
        self.k += 1
        return torch.zeros_like(like).index_fill(0, torch.tensor(self.k), 1.0)


def variance(name: str, path: Path, grid: Tensor, c: float, **knobs: float) -> Tensor:
    """Exact variance of the samples for data N(0, c): the sampler is linear, so its noise weights say it all."""
    x = torch.zeros(len(grid), dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
    weights = SAMPLERS[name](Mixture(path, (1.0,), (0.0,), (c**0.5,)), x, grid, path=path, randn=OneHot(), **knobs)
    first = path.alpha(grid[0]) ** 2 * c + path.sigma(grid[0]) ** 2
    return weights[0] ** 2 * first + (weights[1:] ** 2).sum()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "knobs", "order"),
    [(name, {}, SAMPLERS[name].order) for name in STOCHASTIC]
    + [
        ("ddpm", {"v_posterior": 1.0}, 1),
        ("ddim", {"eta": 0.5}, 1),
        ("euler", {"s_churn": 10.0}, 1),
        ("heun", {"s_churn": 10.0}, 2),
    ],
)
def test_variance_of_stochastic_samplers(path: str, name: str, knobs: dict, order: int) -> None:
    p, c, errors = PATHS[path], 0.35, []
    for n in (40, 80, 160):
        grid = make_grid("exponential", p, n, t_start=SPANS[path][0], t_end=SPANS[path][1])
        wanted = p.alpha(grid[-1]) ** 2 * c + p.sigma(grid[-1]) ** 2
        errors.append((variance(name, p, grid, c, **knobs) / wanted - 1).item())
    # a second-order error may change sign on the way to 0; then it is small from the start
    assert all(o > order - 0.2 for o in orders(errors)) or max(map(abs, errors)) < 1e-4


def test_ddim_agrees_with_the_closed_form_of_a_gaussian() -> None:
    """For data N(m, c) the ODE maps x to m + sqrt(c / (alpha^2 c + sigma^2)) (x - alpha m)."""
    path, m, c = vp_path(), 0.4, 0.3
    grid = make_grid("trailing", path, 1000)
    t = grid[0]
    wanted = m + (c / (path.alpha(t) ** 2 * c + path.sigma(t) ** 2)).sqrt() * (X - path.alpha(t) * m)
    gm = Mixture(path, (1.0,), (m,), (c**0.5,))
    assert (ddim(gm, X, grid, path=path, randn=no_noise) - wanted).abs().max() < 5e-3
    # what remains is the jump from abar_0 to clean data
    assert (dpmpp_2m(gm, X, grid, path=path, randn=no_noise) - wanted).abs().max() < 2e-3


def test_ddpm_agrees_with_the_closed_form_of_a_gaussian() -> None:
    """Mean and variance of Algorithm 2 on data N(m, c), from the official tables by an independent recursion."""
    betas, m, c = make_beta_schedule("linear", 1000, 1e-4, 0.02), 0.4, 0.3
    path = VPPath((1 - betas).cumprod())
    b = {k: v.double().numpy() for k, v in ddpm_buffers(betas).items()}
    mean, var = 0.0, 1.0
    for t in range(999, -1, -1):
        abar = b["alphas_cumprod"][t]
        gain = abar**0.5 * c / (abar * c + 1 - abar)  # E[x0 | x] = m + gain (x - sqrt(abar) m)
        slope = b["posterior_mean_coef1"][t] * gain + b["posterior_mean_coef2"][t]
        mean = slope * mean + b["posterior_mean_coef1"][t] * m * (1 - gain * abar**0.5)
        var = slope**2 * var + b["posterior_variance"][t]
    grid = make_grid("trailing", path, 1000)
    gm = Mixture(path, (1.0,), (m,), (c**0.5,))
    zero = torch.zeros(1, dtype=torch.float64)
    assert ddpm(gm, zero, grid, path=path, randn=torch.zeros_like).item() == pytest.approx(mean, rel=1e-4)
    first = path.alpha(grid[0]) ** 2 * c + path.sigma(grid[0]) ** 2
    x = torch.zeros(1001, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
    weights = ddpm(Mixture(path, (1.0,), (0.0,), (c**0.5,)), x, grid, path=path, randn=OneHot())
    assert (weights[0] ** 2 + (weights[1:] ** 2).sum()).item() == pytest.approx(var, rel=1e-4)
    assert variance("ddpm", path, grid, c).item() == pytest.approx(c, rel=0.02)
    assert mean == pytest.approx(m, abs=0.001) and first == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
def test_ddpm_is_algorithm_2_step_by_step(v_posterior: float) -> None:
    betas = make_beta_schedule("linear", 100, 1e-3, 0.05)
    path, b = VPPath((1 - betas).cumprod()), ddpm_buffers(betas, v_posterior)
    gm, noise = Mixture(path), Noise()
    mine = ddpm(gm, X, make_grid("trailing", path, 100), path=path, randn=noise, v_posterior=v_posterior)
    x, noise = X, Noise()
    for t in range(99, -1, -1):
        when = torch.tensor(float(t), dtype=torch.float64)
        eps = (x - path.alpha(when) * gm(x, when)) / path.sigma(when)
        z = noise(x) if t > 0 else 0
        mean = (x - b["betas"][t] / b["sqrt_one_minus_alphas_cumprod"][t] * eps) / (1 - b["betas"][t]).sqrt()
        x = mean + b["posterior_variance"][t].sqrt() * z
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- one family


@pytest.mark.parametrize("path", PATHS)
def test_names_for_the_same_sampler(path: str) -> None:
    p = PATHS[path]
    gm, grid = Mixture(p), make_grid(p.default_grid, p, 12)

    def run(f: Callable[..., Tensor], **knobs: float) -> Tensor:
        return f(gm, start_of(p, grid), grid, path=p, randn=Noise(), **knobs)

    torch.testing.assert_close(run(euler), run(ddim))
    torch.testing.assert_close(run(euler_ancestral), run(ddim, eta=1.0))
    torch.testing.assert_close(run(ddpm), run(ddim, eta=1.0))
    torch.testing.assert_close(run(euler_ancestral, eta=0.0), run(ddim))
    torch.testing.assert_close(run(dpmpp_2m_sde, eta=0.0), run(dpmpp_2m))
    torch.testing.assert_close(run(lms, order=1), run(ddim))


def test_flow_is_the_straight_line() -> None:
    """On FlowPath, Euler's step is x + (s - t) v with the velocity v = n - x0."""
    path = PATHS["flow"]
    grid = make_grid("trailing", path, 10)
    x = X
    for t, s in zip(grid, grid[1:], strict=False):
        x0 = Mixture(path)(x, t)
        x = x + (s - t) * (x - x0) / t
    torch.testing.assert_close(euler(Mixture(path), X, grid, path=path, randn=no_noise), x)


def test_edm_algorithm_2() -> None:
    """Heun with churn, written out as in the EDM paper."""
    path, n = VEPath(), 8
    gm, grid = Mixture(path), make_grid("karras", VEPath(), n)
    s_churn, s_tmin, s_tmax, s_noise = 3.0, 0.05, 50.0, 1.003
    mine = heun(
        gm, 80 * X, grid, path=path, randn=Noise(), s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise
    )
    x, noise = 80 * X, Noise()
    for t, s in zip(grid, grid[1:], strict=False):
        gamma = min(s_churn / n, 2**0.5 - 1) if s_tmin <= t <= s_tmax else 0
        hat = t + gamma * t
        if gamma > 0:
            x = x + (hat**2 - t**2).sqrt() * s_noise * noise(x)
        d = (x - gm(x, hat)) / hat
        step = x + (s - hat) * d
        if s > 0:
            step = x + (s - hat) * (d + (step - gm(step, s)) / s) / 2
        x = step
    torch.testing.assert_close(mine, x)
    assert noise.calls == int(((grid[:-1] >= s_tmin) & (grid[:-1] <= s_tmax)).sum()) > 0


# -------------------------------------------------------------------------------------------- steps, calls, noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_number_of_calls_steps_and_draws(name: str) -> None:
    path, row = vp_path(), SAMPLERS[name]
    for n in (1, 2, 3, 5, 50):
        grid, times, seen, noise = make_grid("trailing", path, n), [], [], Noise()

        def denoise(x: Tensor, t: Tensor, times: list = times) -> Tensor:
            times.append(t.item())
            return Mixture(path)(x, t)

        def callback(i: int, t: Tensor, x: Tensor, x0: Tensor, seen: list = seen) -> None:
            seen.append((i, t.item(), x.shape, x0.shape))

        x = row(denoise, X, grid, path=path, randn=noise, callback=callback)
        assert len(times) == row.calls(n)
        assert min(times) >= path.t_min and max(times) <= path.t_max
        assert seen == [(i, t, X.shape, X.shape) for i, t in enumerate(grid[1:].tolist())]
        assert noise.calls == (n if row.stochastic else 0)
        assert x.isfinite().all()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g not in OFFICIAL_GRIDS])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_near_the_data_on_every_grid(name: str, grid: str) -> None:
    """Also where alpha starts at 0 or nearly so (flow, cosine, zero terminal SNR), and for very few steps."""
    for kind, path in HARD.items():
        if grid == "leading" and path.timesteps is None:
            continue
        for n in (1, 2, 4, 25):
            times = make_grid(grid, path, n)
            z = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            x = SAMPLERS[name](Mixture(path), z * path.sigma(times[0]), times, path=path, randn=Noise())
            assert x.isfinite().all(), (kind, n)
            if n == 25 and not (kind == "ve" and grid in ("linspace", "trailing")):  # equal steps in sigma are hopeless
                assert 0.4 < x.std() < 1.5 and x.abs().max() < 6, (kind, n, x.std())


@pytest.mark.parametrize("name", ["heun", "plms"])
def test_start_from_pure_noise(name: str) -> None:
    """A trapezoid in sigma / alpha from 20,000 (cosine's last step) threw the sample to 100 times the data's scale."""
    z = torch.special.ndtri((torch.arange(100, dtype=torch.float64) + 0.5) / 100)
    for path in (cosine_path(), zero_snr_path()):
        fine = dpmpp_2m(Mixture(path), z, make_grid("trailing", path, 1000), path=path, randn=no_noise)
        x = SAMPLERS[name](Mixture(path), z, make_grid("trailing", path, 20), path=path, randn=no_noise)
        assert (x - fine).pow(2).mean().sqrt() < 0.05


def test_image_dtype_and_shape_are_kept() -> None:
    path = vp_path()
    for name, row in SAMPLERS.items():
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        before = x.clone()
        out = row(Mixture(path), x, make_grid("trailing", path, 4), path=path, randn=Noise())
        assert out.dtype == torch.float32 and out.shape == x.shape, name
        assert torch.equal(x, before), f"{name} changed its input"


@pytest.mark.parametrize("name", SAMPLERS)
def test_stop_and_no_step_at_all(name: str) -> None:
    path, row, done = vp_path(), SAMPLERS[name], []
    grid = make_grid("trailing", path, 10)

    def stop(i: int, t: Tensor, x: Tensor, x0: Tensor) -> bool:
        done.append(i)
        return i == 2

    stopped = row(Mixture(path), X, grid, path=path, randn=Noise(), callback=stop)
    assert done == [0, 1, 2]
    states: list[Tensor] = []
    row(Mixture(path), X, grid, path=path, randn=Noise(), callback=lambda i, t, x, x0: states.append(x))
    assert torch.equal(stopped, states[2])
    assert torch.equal(row(Mixture(path), X, grid[-1:], path=path, randn=no_noise), X)


@pytest.mark.parametrize("name", SAMPLERS)
def test_project_is_called_before_each_step(name: str) -> None:
    path, times = vp_path(), []
    grid = make_grid("trailing", path, 6)

    def project(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.item())
        return torch.zeros_like(x)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t.item())
        assert len(calls) in second or (x == 0).all()
        return Mixture(path)(x, t)

    calls: list[float] = []
    second = {"heun": range(2, 12, 2), "dpmpp_2s_ancestral": range(2, 12, 2), "plms": [2]}.get(name, [])
    SAMPLERS[name](denoise, X, grid, path=path, randn=Noise(), project=project)
    assert times == grid[:-1].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_devices_without_a_gpu_at_hand(name: str) -> None:
    """Under fake cuda tensors: mixed devices and reads of values (which would wait for the GPU) both raise."""
    with FakeTensorMode():
        path = VPPath(torch.linspace(0.99, 0.01, 20))
        x = torch.randn(2, 3, 8, 8, device="cuda")
        grid = make_grid("trailing", path, 5)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return x * t.to(x.device, x.dtype)

        out = SAMPLERS[name](denoise, x, grid, path=path, randn=torch.randn_like)
        assert out.device.type == "cuda" and out.shape == x.shape and out.dtype == torch.float32


def test_table() -> None:
    assert {"ddpm", "ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"} < set(SAMPLERS)
    assert SAMPLERS["ddim"].knobs == {"eta": 0.0} and SAMPLERS["plms"].knobs == {}
    for name, row in SAMPLERS.items():
        assert row.function.__name__ == name
        assert list(inspect.signature(row.function).parameters)[:3] == ["denoise", "x", "grid"]
        assert np.isscalar(row.order) and row.description and "." in row.function.__doc__


def test_errors() -> None:
    path = vp_path()
    for function, order in ((lms, 5), (unipc, 4), (unipc, 0)):
        with pytest.raises(ValueError, match=f"order: got {order}, expected 1 to"):
            function(Mixture(path), X, make_grid("trailing", path, 3), path=path, randn=no_noise, order=order)
    with pytest.raises(TypeError, match="eta"):
        SAMPLERS["plms"](Mixture(path), X, make_grid("trailing", path, 3), path=path, randn=no_noise, eta=1.0)
