"""Every sampler as one function on a general path, and the table SAMPLERS.

    x = euler(denoise, x, grid, path=path, randn=randn)

denoise(x, t) -> x0 is any denoiser (conditions, guidance and clipping are closures around it: guidance.py); grid
[n + 1] holds decreasing times (schedule.make_grid); x [B, ...] is the noise at grid[0]; randn(x) gives all noise that
is used. project(x, t), if given, edits x before each step (inpainting). callback(i, t, x, x0), if given, is called
after step i with its new time, its new state (which it may change in place) and the x0 it used; a true result ends
the loop there.

All are steps of one family (DDIM, Song et al. 2020): read x_t = alpha x0 + sigma eps, and write x0 and eps with the
next alpha and sigma:

    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0

With z = x / alpha and rho = sigma / alpha this is Euler's method for dz / drho = eps, whatever the path. t is the time
of the step, s the next, lam = log(alpha / sigma), h = lam_s - lam_t. The last step is first order wherever a formula
would need the slope at its end, because that is usually clean data, where eps is not defined.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise, Randn
from ldm.diffusion.schedule import Path
from ldm.diffusion.steps import (
    Callback,
    Point,
    Project,
    churn,
    eps_of,
    lagrange_means,
    move,
    move_along,
    point,
    predict,
    split,
    steps,
    unipc_step,
)

# -------------------------------------------------------------------------------------------------- one call a step


def ddpm(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    v_posterior: float = 0.0,
) -> Tensor:
    """Algorithm 2 of "Denoising Diffusion Probabilistic Models" (Ho et al. 2020), on any path and grid.

    With s = t - 1, alpha = alpha_t / alpha_s is the paper's sqrt(alpha_t) and beta = 1 - alpha^2 its beta_t.
    v_posterior: the variance is (1 - v) beta~_t + v beta_t, the paper's two choices at 0 and 1. n calls.
    """
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)  # x0 = (x_t - sigma_t eps_theta(x_t, t)) / alpha_t, eq. 15
        alpha = t.alpha / s.alpha
        beta = t.sigma**2 - alpha**2 * s.sigma**2
        # q(x_{t-1} | x_t, x0), eq. 6-7; with x0 from above, line 4: (x_t - beta / sigma_t eps_theta) / alpha
        mean = (alpha * s.sigma**2 * x + s.alpha * beta * x0) / t.sigma**2
        variance = (1 - v_posterior) * beta * (s.sigma / t.sigma) ** 2 + v_posterior * beta
        z = (s.sigma > 0) * randn(x)  # line 3: z ~ N(0, I) if t > 1, else z = 0
        x = mean + variance.clamp(min=0).sqrt() * z
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, eq. 12 and 16): eta 0 is deterministic, eta 1 is DDPM with variance beta~. n calls."""
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        down, up = split(t, s, eta)
        x = move(x, x0, t, s, down)
        if eta > 0:
            x = x + up * randn(x)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method down to sigma_down, then noise up to sigma_s (Crowson, k-diffusion): DDIM with eta 1. n calls.

    s_noise scales the fresh noise; a little above 1 makes up for what the denoiser smooths away.
    """
    return ddim(
        denoise,
        x,
        grid,
        path=path,
        randn=lambda like: s_noise * randn(like),
        project=project,
        callback=callback,
        eta=eta,
    )


def plms(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, "PNDM", eq. 12): Adams-Bashforth weights on eps. n + 1 calls.

    The first step is Heun's (two calls; one if it is the only step). The weights are those for equal steps, which
    grids are not, so the order is 2 and not 4; `lms` has the exact weights.
    """
    weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    past: list[Tensor] = []  # eps, newest first
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        eps = eps_of(x, x0, t)
        past = [eps, *past[:3]]
        if len(past) > 1:
            slope = sum(w * e for w, e in zip(weights[len(past)], past, strict=True))
        elif len(grid) > 2:
            x_s = move(x, x0, t, s)
            slope = (eps + eps_of(x_s, denoise(x_s, s.t), s)) / 2
        else:
            slope = eps
        x, x0 = move_along(x0, eps, slope, t, s)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep (Adams-Bashforth for unequal steps): the polynomial through the last `order` slopes,
    integrated over rho. n calls. Starts with Euler's step. order in 1..4."""
    if not 1 <= order <= 4:
        raise ValueError(f"lms order: got {order}, expected 1 to 4")
    past: list[tuple[Tensor, Tensor]] = []  # (rho, eps), newest first
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        eps = eps_of(x, x0, t)
        past = [(t.rho, eps), *past[: order - 1]]
        weights = lagrange_means([rho for rho, _ in past], t.rho, s.rho)
        slope = sum(w * e for w, (_, e) in zip(weights, past, strict=True))
        x, x0 = move_along(x0, eps, slope, t, s)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    lower_order_final: bool = True,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): x0 extrapolated in lambda to the middle of the step. n calls.

    lower_order_final: first-order last step; needed on grids that end at clean data, where h has no bound.
    """
    x0_last, h_last = None, None
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        h = s.lam - t.lam
        first_order = x0_last is None or (lower_order_final and i == len(grid) - 2)
        middle = x0 if first_order else x0 + h / (2 * h_last) * (x0 - x0_last)
        x = move(x, middle, t, s)
        x0_last, h_last = x0, h
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5): `dpmpp_2m` for the reverse SDE with eta times its noise.

    eta 0 is `dpmpp_2m`. n calls. First-order last step.
    """
    x0_last, h_last = None, None
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        h = s.lam - t.lam
        first_order = x0_last is None or i == len(grid) - 2
        middle = x0 if first_order else x0 + h / (2 * h_last) * (x0 - x0_last)
        keep = (-eta * h).exp()
        x = s.sigma / t.sigma * keep * x - s.alpha * torch.expm1(-(1 + eta) * h) * middle
        if eta > 0:
            x = x + s_noise * s.sigma * (1 - keep**2).sqrt() * randn(x)
        x0_last, h_last = x0, h
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    order: int = 2,
) -> Tensor:
    """UniPC (Zhao et al. 2023, Algorithms 5-8, data prediction, B(h) = e^h - 1). order in 1..3. n calls.

    Each call both corrects the step that led to it and predicts the next. Order grows from 1 at the start and falls
    to 1 at the end.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"unipc order: got {order}, expected 1 to 3")
    past: list[tuple[Point, Tensor]] = []  # (point, x0), newest first
    x_last, p = x, 1
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        if past:
            x = unipc_step(x_last, past[:p], t, (t, x0))
        past = [(t, x0), *past[: order - 1]]
        p = min(len(past), len(grid) - 1 - i)
        x_last, x = x, unipc_step(x, past[:p], s)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


# ------------------------------------------------------------------------------------------------- two calls a step


def euler(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method: DDIM with eta 0, and with s_churn the stochastic sampler of EDM without its correction. n calls.

    s_churn, s_tmin, s_tmax, s_noise: EDM Algorithm 2; s_churn / n is the share of noise added before each step whose
    sigma / alpha lies in [s_tmin, s_tmax].
    """
    for i, (t, s) in steps(path, grid):
        x = x if project is None else project(x, t.t)
        x, t = churn(x, t, path, randn, s_churn / (len(grid) - 1), (s_tmin, s_tmax), s_noise)
        x0 = denoise(x, t.t)
        x = move(x, x0, t, s)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method, the sampler of EDM (Karras et al. 2022, Algorithm 2): mean slope of both ends. 2 n - 1 calls.

    Last step Euler's. s_churn and the rest: see `euler`.
    """
    for i, (t, s) in steps(path, grid):
        x = x if project is None else project(x, t.t)
        x, t = churn(x, t, path, randn, s_churn / (len(grid) - 1), (s_tmin, s_tmax), s_noise)
        x0 = denoise(x, t.t)
        x_s = move(x, x0, t, s)
        if i < len(grid) - 2:
            eps = eps_of(x, x0, t)
            slope = (eps + eps_of(x_s, denoise(x_s, s.t), s)) / 2
            x_s, x0 = move_along(x0, eps, slope, t, s)
        x = x_s
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
    *,
    path: Path,
    randn: Randn,
    project: Project | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1) with ancestral noise (k-diffusion). 2 n - 1 calls.

    The x0 of a step is that of its middle in lambda. Last step Euler's.
    """
    for i, (t, s) in steps(path, grid):
        x, x0 = predict(denoise, project, x, t)
        down, up = split(t, s, eta)
        if i < len(grid) - 2:
            lam_down = (s.alpha / down).log()
            mid = point(path, path.time((t.lam + lam_down) / 2))
            x0 = denoise(move(x, x0, t, mid), mid.t)
        x = move(x, x0, t, s, down)
        if eta > 0:
            x = x + s_noise * up * randn(x)
        if callback is not None and callback(i, s.t, x, x0):
            break
    return x


# ------------------------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS; calling it calls the function."""

    function: Callable[..., Tensor]
    order: int  # errors fall as n^-order: of the image for deterministic samplers, of the variance for stochastic ones
    calls: Callable[[int], int]  # network calls for n steps
    stochastic: bool  # draws noise with its default knobs
    description: str

    def __call__(self, denoise: Denoise, x: Tensor, grid: Tensor, **options: object) -> Tensor:
        return self.function(denoise, x, grid, **options)

    @property
    def knobs(self) -> dict[str, object]:
        """The function's own settings with their defaults."""
        common = ("path", "randn", "project", "callback")
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in common}


def _one(n: int) -> int:
    return n


def _two(n: int) -> int:
    return 2 * n - 1


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, _one, True, "DDPM, Algorithm 2: ancestral sampling; wants many steps"),
    "ddim": Sampler(ddim, 1, _one, False, "DDIM; eta from 0 (deterministic) to 1 (as DDPM)"),
    "plms": Sampler(
        plms, 2, lambda n: n + (n > 1), False, "PNDM's multistep, equal-step weights; the classic of SD v1"
    ),
    "euler": Sampler(euler, 1, _one, False, "Euler's method = DDIM; s_churn makes it stochastic"),
    "euler_ancestral": Sampler(euler_ancestral, 1, _one, True, "Euler with fresh noise each step = DDIM with eta 1"),
    "heun": Sampler(heun, 2, _two, False, "EDM's sampler: second order, two calls a step"),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, _one, False, "DPM-Solver++(2M): second order at one call a step; 20 steps do"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, _one, True, "DPM-Solver++(2M) for the SDE; forgives network errors"),
    "dpmpp_2s_ancestral": Sampler(dpmpp_2s_ancestral, 2, _two, True, "DPM-Solver++(2S) with ancestral noise"),
    "unipc": Sampler(unipc, 2, _one, False, "UniPC: predictor and corrector at one call a step; good below 15 steps"),
    "lms": Sampler(lms, 2, _one, False, "linear multistep with the exact weights for unequal steps"),
}
