"""Betas, official buffers, paths and grids."""

from pathlib import Path as File

import numpy as np
import pytest
import torch

from ldm.diffusion.schedule import (
    GRIDS,
    OFFICIAL_GRIDS,
    FlowPath,
    Path,
    VEPath,
    VPPath,
    ddpm_buffers,
    make_beta_schedule,
    make_grid,
    rescale_betas_zero_snr,
    slice_grid,
)
from tests.diffusion.oracle import PATHS, cosine_path, vp_path, zero_snr_path
from tests.reference import compare

FIXTURES = File(compare.__file__).parent / "fixtures"
EXACT = [name for name in GRIDS if name not in OFFICIAL_GRIDS]
ALL_PATHS: dict[str, Path] = {
    **PATHS,
    "cosine": cosine_path(),
    "zero_snr": zero_snr_path(),
    "short": vp_path(10, 0.1, 0.3),
}


@pytest.mark.parametrize("name", sorted(p.stem for p in FIXTURES.glob("ddpm_schedule_*.json")))
def test_official_buffers(name: str) -> None:
    fx = compare.load(FIXTURES / f"{name}.json")
    params = dict(fx["params"])
    betas = params.get("given_betas")
    if betas is None:
        options = {k: params[k] for k in ("linear_start", "linear_end", "cosine_s") if k in params}
        betas = make_beta_schedule(params.get("beta_schedule", "linear"), params["timesteps"], **options)
    buffers = ddpm_buffers(betas, params.get("v_posterior", 0.0), params.get("parameterization", "eps"))
    assert set(buffers) == set(fx["keys"]) | {"lvlb_weights"}
    assert all(t.dtype == torch.float32 for t in buffers.values())
    assert compare.check(fx, buffers) == []


def test_lvlb_weights_of_the_other_parametrisations() -> None:
    betas = make_beta_schedule("linear", 100)
    abar = np.cumprod(1 - betas)
    x0 = ddpm_buffers(betas, parameterization="x0")["lvlb_weights"].double().numpy()
    np.testing.assert_allclose(x0[1:], (0.5 * abar**0.5 / (2 - abar))[1:], rtol=1e-6)
    assert x0[0] == x0[1]
    assert (ddpm_buffers(betas, parameterization="v")["lvlb_weights"] == 1).all()


def test_names_of_beta_schedules() -> None:
    """`linear` is linear in sqrt(beta); plain linear is called `sqrt_linear`."""
    np.testing.assert_allclose(np.diff(make_beta_schedule("linear", 50) ** 0.5, 2), 0, atol=1e-15)
    np.testing.assert_allclose(np.diff(make_beta_schedule("sqrt_linear", 50), 2), 0, atol=1e-15)
    np.testing.assert_allclose(np.diff(make_beta_schedule("sqrt", 50) ** 2, 2), 0, atol=1e-15)
    abar = np.cumprod(1 - make_beta_schedule("cosine", 1000))
    f = np.cos((np.arange(1001) / 1000 + 8e-3) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], f[1:-1] / f[0], rtol=1e-6)


def test_zero_terminal_snr() -> None:
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    rescaled = rescale_betas_zero_snr(betas)
    abar = np.cumprod(1 - rescaled)
    assert abar[-1] == 0 and rescaled[-1] == 1
    assert abar[0] == pytest.approx(1 - betas[0])
    root, old = abar**0.5, np.cumprod(1 - betas) ** 0.5
    np.testing.assert_allclose(np.diff(root) / np.diff(old), (root[0] - root[-1]) / (old[0] - old[-1]), rtol=1e-6)
    buffers = ddpm_buffers(rescaled, parameterization="v")
    assert all(buffers[k].isfinite().all() for k in buffers if "recip" not in k)
    path = VPPath(abar)
    assert path.alpha(torch.tensor(999.0)) < 1e-20 and path.sigma(torch.tensor(999.0)) == 1


@pytest.mark.parametrize("name", ALL_PATHS)
def test_path_is_consistent(name: str) -> None:
    path = ALL_PATHS[name]
    t = torch.linspace(path.t_min, path.t_max, 4001, dtype=torch.float64)[:-1]
    alpha, sigma = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(path.lam(t), (alpha / sigma).log())
    torch.testing.assert_close(path.time(path.lam(t)), t, rtol=1e-9, atol=1e-9)
    if isinstance(path, VPPath):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    clean = torch.tensor(path.t_clean, dtype=torch.float64)
    assert path.alpha(clean) == 1 and path.sigma(clean) == 0


def test_vp_path_hits_its_table_for_any_kind_of_time() -> None:
    path = vp_path()
    abar = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
    times = torch.arange(1000)
    np.testing.assert_allclose(path.alpha(times.double()).numpy(), abar**0.5, rtol=1e-14)
    np.testing.assert_allclose(path.sigma(times.double()).numpy(), (1 - abar) ** 0.5, rtol=1e-12)
    for t in (times, times.float()):
        assert path.alpha(t).dtype == torch.float32
        np.testing.assert_allclose(path.alpha(t).numpy(), abar**0.5, rtol=2e-6)
    buffers = ddpm_buffers(1 - abar / np.append(1, abar[:-1]))
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    wanted = buffers["sqrt_alphas_cumprod"][t].view(3, 1, 1, 1) * x0
    wanted = wanted + buffers["sqrt_one_minus_alphas_cumprod"][t].view(3, 1, 1, 1) * noise
    torch.testing.assert_close(path.add_noise(x0, noise, t), wanted)


@pytest.mark.parametrize("grid", EXACT)
@pytest.mark.parametrize("name", ALL_PATHS)
def test_every_step_count_is_exact(name: str, grid: str) -> None:
    path = ALL_PATHS[name]
    if grid == "leading" and path.timesteps is None:
        with pytest.raises(ValueError, match="expected a path with a table"):
            make_grid(grid, path, 10)
        return
    for n in range(1, 1001):
        times = make_grid(grid, path, n)
        assert len(times) == n + 1 and times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert times[-1] == path.t_clean and times[-2] >= path.t_min - 1e-9 and times[0] <= path.t_max
        if grid != "leading":
            assert times[0] == path.t_max


def test_grids_with_given_ends() -> None:
    for name in ("trailing", "linspace", "karras", "exponential", "uniform_logsnr"):
        for path, start, end in ((PATHS["vp"], 700.0, 20.0), (VEPath(), 10.0, 0.1), (FlowPath(), 0.9, 0.1)):
            times = make_grid(name, path, 7, t_start=start, t_end=end)
            assert len(times) == 8 and times[0] == start and times[-1] == end and (times.diff() < 0).all()


def test_whole_timesteps() -> None:
    path = PATHS["vp"]
    assert torch.equal(make_grid("trailing", path, 1000), torch.arange(999, -2, -1.0).double())
    assert make_grid("trailing", path, 4).tolist() == [999, 749, 499, 249, -1]
    assert make_grid("leading", path, 4).tolist() == [750, 500, 250, 0, -1]
    for n in range(1, 1001):
        assert (make_grid("trailing", path, n) % 1 == 0).all()


def test_karras_levels() -> None:
    sigmas = make_grid("karras", VEPath(0.002, 80.0), 18)[:-1]
    i = torch.arange(18, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigmas, wanted, rtol=1e-9, atol=1e-12)


def test_uniform_grids_in_lambda() -> None:
    path = PATHS["vp"]
    for name, n in (("exponential", 20), ("uniform_logsnr", 19)):
        lam = path.lam(make_grid(name, path, n)[:-1])
        torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(n - 1))


def test_official_grids_keep_their_traps() -> None:
    path = PATHS["vp"]
    assert make_grid("uniform", path, 50).tolist() == [*range(981, 0, -20), 0]
    asked = {7: 8, 30: 31, 60: 63, 75: 77}
    assert {n: len(make_grid("uniform", path, n)) - 1 for n in asked} == asked
    # these asked the table for timestep 1000 of 1000; that time is left out
    assert make_grid("uniform", path, 3).tolist() == [667, 334, 1, 0]
    assert make_grid("uniform", path, 1000)[0] == 999
    assert make_grid("quad", path, 50)[-7:].tolist() == [9, 6, 3, 2, 1, 1, 0]
    with pytest.raises(ValueError, match="got 1001 steps, expected 1 to 1000"):
        make_grid("uniform", path, 1001)


def test_slice_for_image_to_image() -> None:
    grid = make_grid("trailing", PATHS["vp"], 50)
    assert torch.equal(slice_grid(grid, 1.0), grid)
    assert slice_grid(grid, 0.0).tolist() == [-1]
    assert len(slice_grid(grid, 0.75)) - 1 == 37
    assert len(slice_grid(make_grid("trailing", PATHS["vp"], 100), 0.29)) - 1 == 29
    with pytest.raises(ValueError, match="strength: got 1.5"):
        slice_grid(grid, 1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_beta_schedule("lineer", 10), "got 'lineer', expected one of linear"),
        (lambda: make_beta_schedule("linear", 0), "n_timestep: got 0"),
        (lambda: ddpm_buffers([0.1, 1.2]), "betas: got"),
        (lambda: ddpm_buffers([0.1, 0.2], parameterization="score"), "got 'score', expected eps, x0 or v"),
        (lambda: make_grid("karas", FlowPath(), 3), "got 'karas', expected one of trailing"),
        (lambda: make_grid("karras", FlowPath(), 0), "number of steps: got 0"),
        (lambda: make_grid("uniform", FlowPath(), 3), "got FlowPath, expected a path with a table"),
        (lambda: make_grid("leading", vp_path(), 3, t_end=5.0), "got t_start or t_end"),
        (lambda: VPPath(torch.ones(2, 2)), r"alphas_cumprod: got shape \(2, 2\)"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_official_is_the_name_of_the_uniform_grid():
    path = VPPath(torch.linspace(0.999, 0.001, 1000))
    assert torch.equal(make_grid("official", path, 50), make_grid("uniform", path, 50))
