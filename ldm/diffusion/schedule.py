"""Noise schedules, noise paths and time grids.

A *path* says how much signal and noise x_t holds: x_t = alpha_t x0 + sigma_t n, n ~ N(0, I). Everything else (denoiser,
samplers, training target) is written for a general path through `alpha`, `sigma` and lambda = log(alpha / sigma).

    path      time t                         alpha          sigma             clean data at
    VPPath    table index in [-1, T - 1]     sqrt(abar_t)   sqrt(1 - abar_t)  t = -1
    VEPath    the noise level itself         1              t                 t = 0
    FlowPath  [0, 1]                         1 - t          t                 t = 0

A *grid* is a strictly decreasing list of n + 1 times: n steps from noise to data.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
# |lambda| is cut here: far outside any trained noise level, and it keeps infinities out of the samplers' formulas.
LAMBDA_MAX = 50.0
# Grids in noise-level space start no higher than this sigma / alpha; above it the image holds nothing but noise.
RATIO_MAX = 200.0


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Variances beta_t of the forward process q(x_t | x_{t-1}) (DDPM, Ho et al. 2020, eq. 2): float64 [T] in (0, 1).

    Name trap, kept because configs and checkpoints depend on it: `linear` is linear in sqrt(beta); the schedule that
    the DDPM paper calls linear is `sqrt_linear`. `cosine` is Nichol & Dhariwal 2021, eq. 17. Raises ValueError.
    """
    if n_timestep < 1:
        raise ValueError(f"n_timestep: got {n_timestep}, expected at least 1")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        t = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s
        abar = np.cos(t / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)
    raise ValueError(f"beta_schedule: got {schedule!r}, expected one of {', '.join(BETA_SCHEDULES)}")


def rescale_betas_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(abar) so that x_T is pure noise (Lin et al. 2023, Algorithm 1). betas, result: float64 [T].

    eps says nothing about x0 where alpha is 0: train and sample such a schedule with v or x0.
    """
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1 - abar / np.concatenate([[1.0], abar[:-1]])


def ddpm_buffers(
    betas: np.ndarray | Sequence[float], v_posterior: float = 0.0, parameterization: str = "eps"
) -> dict[str, Tensor]:
    """The tables of the DDPM paper under the official buffer names, each float32 [T].

    posterior_*: q(x_{t-1} | x_t, x0), eq. 6-7; its variance is (1 - v) beta~_t + v beta_t with v = v_posterior.
    lvlb_weights: weight of each term of the variational bound (eq. 12) for the network's output.
    Raises ValueError for betas outside [0, 1] or an unknown parameterization.
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0 or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(f"betas: got shape {betas.shape}, expected [T] with values in [0, 1]")
    alphas = 1 - betas
    abar = np.cumprod(alphas)
    abar_prev = np.append(1.0, abar[:-1])
    with np.errstate(divide="ignore"):  # abar_T = 0 (zero terminal SNR) gives inf here, as it should
        variance = (1 - v_posterior) * betas * (1 - abar_prev) / (1 - abar) + v_posterior * betas
        tables = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
            "log_one_minus_alphas_cumprod": np.log(1 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # beta~_0 is 0
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(alphas) / (1 - abar),
            "lvlb_weights": _lvlb_weights(betas, variance, abar, parameterization),
        }
    # torch.tensor, not from_numpy: it follows `with torch.device(...)`, so modules can be built on any device
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}


def _lvlb_weights(betas: np.ndarray, variance: np.ndarray, abar: np.ndarray, parameterization: str) -> np.ndarray:
    # in float32 like the official buffers: 1 - abar_0 is 1e-4, so the rounding shows in the fifth digit
    betas, variance, abar, alphas = (np.float32(table) for table in (betas, variance, abar, 1 - betas))
    if parameterization == "eps":
        with np.errstate(invalid="ignore", divide="ignore"):  # x / 0 at the first step, replaced below
            weights = betas**2 / (2 * variance * alphas * (1 - abar))
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(abar) / (2.0 * 1 - abar)  # "2 * 1 - abar" without parentheses, as checkpoints had it
    elif parameterization == "v":
        weights = np.ones_like(betas)
    else:
        raise ValueError(f"parameterization: got {parameterization!r}, expected eps, x0 or v")
    weights[0] = weights[min(1, len(weights) - 1)]
    return weights


# ------------------------------------------------------------------------------------------------------------ paths


def expand(t: Tensor, ndim: int) -> Tensor:
    """[B] -> [B, 1, 1, ...] with ndim axes; a scalar stays a scalar."""
    return t if t.ndim == 0 else t.reshape(-1, *([1] * (ndim - 1)))


class Path:
    """x_t = alpha(t) x0 + sigma(t) n. Times are float tensors of any shape and device; results have the same."""

    t_max: float  # where sampling starts
    t_min: float  # the lowest noise level that a network is asked about
    t_clean: float  # alpha 1, sigma 0
    timesteps: int | None = None  # T, where times are indices of a table
    default_grid: str = "trailing"

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define sigma(t)")

    def lam(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), half the log signal-to-noise ratio, cut to +-LAMBDA_MAX."""
        return (self.alpha(t).log() - self.sigma(t).log()).clamp(-LAMBDA_MAX, LAMBDA_MAX)

    def time(self, lam: Tensor) -> Tensor:
        """The inverse of `lam`."""
        raise NotImplementedError(f"{type(self).__name__} must define time(lam)")

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0): x0, noise [B, ...], t scalar or [B] -> x_t [B, ...] (DDPM eq. 4)."""
        return expand(self.alpha(t), x0.ndim) * x0 + expand(self.sigma(t), x0.ndim) * noise


class VPPath(Path):
    """Variance preserving: alpha^2 = abar_t, sigma^2 = 1 - abar_t (DDPM). alphas_cumprod: [T], decreasing.

    Time is the index of the table, continued to -1 (clean data) and, between indices, linearly in log abar as in
    DPM-Solver (Lu et al. 2022, appendix D.4). Whole indices give the table's own values.
    """

    t_min, t_clean = 0.0, -1.0

    def __init__(self, alphas_cumprod: Tensor | np.ndarray | Sequence[float]) -> None:
        abar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if abar.ndim != 1:
            raise ValueError(f"alphas_cumprod: got shape {tuple(abar.shape)}, expected [T]")
        log_abar = abar.clamp(min=math.exp(-2 * LAMBDA_MAX)).log()
        self.timesteps = len(abar)
        self.t_max = float(self.timesteps - 1)
        self.log_abar = F.pad(log_abar, (1, 0))  # entry i is time i - 1
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = self.log_abar.to(*key)
        return self._moved[key]

    def _log_abar(self, t: Tensor) -> Tensor:
        t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
        table = self._table(t)
        i = (t + 1).floor().clamp(0, self.timesteps - 1)
        low = table.take(i.long())  # not table[i], which waits for the value of a scalar i
        return low + (t + 1 - i) * (table.take(i.long() + 1) - low)

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self._log_abar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self._log_abar(t)).abs().sqrt()

    def lam(self, t: Tensor) -> Tensor:
        log_abar = self._log_abar(t)
        return (0.5 * (log_abar - (-torch.expm1(log_abar)).log())).clamp(-LAMBDA_MAX, LAMBDA_MAX)

    def time(self, lam: Tensor) -> Tensor:
        table, log_abar = self._table(lam), F.logsigmoid(2 * lam)
        i = torch.searchsorted(-table, -log_abar).clamp(1, self.timesteps)
        high, low = table.take(i - 1), table.take(i)
        return i - 2 + ((high - log_abar) / (high - low).clamp(min=1e-30)).clamp(0, 1)


class VEPath(Path):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022, "EDM")."""

    t_clean = 0.0
    default_grid = "karras"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.t_min, self.t_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, lam: Tensor) -> Tensor:
        return (-lam).exp()


class FlowPath(Path):
    """Rectified flow / optimal-transport path: alpha = 1 - t, sigma = t (Liu et al. 2022, Lipman et al. 2022)."""

    t_max, t_clean = 1.0, 0.0

    def __init__(self, t_min: float = 1e-3) -> None:
        self.t_min = t_min

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, lam: Tensor) -> Tensor:
        return (-lam).sigmoid()


# ------------------------------------------------------------------------------------------------------------ grids


def _linspace(start: float, end: float, count: int) -> Tensor:
    # grids live on the host in float64: a step's coefficients never make an accelerator wait
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def _trailing(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """Equal steps from t_max to clean data (Lin et al. 2023, table 2); whole indices where the path has a table."""
    start, end = _ends(path, t_start, t_end)
    discrete = path.timesteps is not None and t_start is None and t_end is None
    if discrete and n > path.timesteps:
        return _evenly(path, n, None, None)
    grid = _linspace(start, end, n + 1)
    return (grid + 0.5).floor() if discrete else grid


def _leading(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """floor(i T / n), i = n - 1 .. 0, then clean data. Trap: it starts below T - 1, where x_T is not yet pure noise."""
    _refuse_ends("leading", path, t_start, t_end)
    if n > path.timesteps:
        return _evenly(path, n, None, None)
    times = torch.arange(n - 1, -1, -1, device="cpu") * path.timesteps // n
    return F.pad(times.to(torch.float64), (0, 1), value=path.t_clean)


def _evenly(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """n equally spaced times from t_max to t_min, then clean data; n + 1 times if t_end is given."""
    return _with_clean(path, n, t_start, t_end, _linspace)


def _karras(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """n levels with equal steps in (sigma / alpha)^(1 / 7) from t_max to t_min, then clean data (EDM eq. 5)."""
    return _in_lambda(path, n, t_start, t_end, rho=7.0)


def _exponential(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """n levels with equal steps in lambda from t_max to t_min, then clean data."""
    return _in_lambda(path, n, t_start, t_end)


def _uniform_logsnr(path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """n equal steps in lambda from t_max to t_min (DPM-Solver's `logSNR`), the last of which goes on to clean data."""
    if t_end is not None:
        return _in_lambda(path, n, t_start, t_end)
    return F.pad(_in_lambda(path, n, t_start, path.t_min)[:-1], (0, 1), value=path.t_clean)


def ddim_timesteps(method: str, n: int, timesteps: int) -> np.ndarray:
    """The times of the two official DDIM / PLMS grids, ascending, int64. Their traps are kept:

    uniform: range(0, T, T // n) + 1. Not always n times (30 -> 31, 7 -> 8), and it starts below T - 1. Where its last
        time would be T (599 of the counts 1..1000 with T = 1000), which no table has, that time is left out.
    quad: int(linspace(0, sqrt(0.8 T), n)^2) + 1. Repeats its first times (50 begin 1, 1, 2, 3), so only one-step
        samplers can use it, and it starts at 0.8 T.
    """
    if not 1 <= n <= timesteps:
        raise ValueError(f"grid {method!r}: got {n} steps, expected 1 to {timesteps}")
    if method == "uniform":
        return np.arange(0, max(timesteps - 1, 1), timesteps // n) + min(1, timesteps - 1)
    if method == "quad":
        return (np.linspace(0, np.sqrt(0.8 * timesteps), n) ** 2).astype(np.int64) + 1
    raise ValueError(f"DDIM grid: got {method!r}, expected one of {', '.join(OFFICIAL_GRIDS)}")


def _official(name: str, path: Path, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """`ddim_timesteps`, then t = 0: one more trap, it stops at abar_0 and not at clean data."""
    _refuse_ends(name, path, t_start, t_end)
    times = ddim_timesteps(name, n, path.timesteps)[::-1].copy()
    return F.pad(torch.tensor(times, dtype=torch.float64, device="cpu"), (0, 1), value=0.0)


OFFICIAL_GRIDS = ("uniform", "quad")
GRIDS: dict[str, Callable[[Path, int, float | None, float | None], Tensor]] = {
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _evenly,
    "karras": _karras,
    "exponential": _exponential,
    "uniform_logsnr": _uniform_logsnr,
    "uniform": partial(_official, "uniform"),
    "quad": partial(_official, "quad"),
}


def make_grid(name: str, path: Path, n: int, *, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """n + 1 strictly decreasing times, float64 on the CPU, from t_start (default t_max) to t_end (default clean data).

    Exactly n steps for every n >= 1, but for the two official grids `uniform` and `quad` (see `ddim_timesteps`).
    Raises ValueError for an unknown name, n < 1, or a grid that needs a table on a path that has none.
    """
    name = "uniform" if name == "official" else name  # the official scripts' own grid
    if name not in GRIDS:
        raise ValueError(f"grid: got {name!r}, expected one of {', '.join(GRIDS)}")
    if n < 1:
        raise ValueError(f"number of steps: got {n}, expected at least 1")
    return GRIDS[name](path, n, t_start, t_end)


def slice_grid(grid: Tensor, strength: float) -> Tensor:
    """The last `strength` part of a grid, for image to image: noise x0 to result[0] and sample from there.

    strength in [0, 1]: 0 leaves one time and no step (with a grid that ends at clean data, the image itself), 1 the
    whole grid. int(strength * n) steps, as the official script counts.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, expected a value in [0, 1]")
    n = len(grid) - 1
    return grid[n - int(strength * n + 1e-6) :]  # 0.29 * 100 is 28.999...


def _ends(path: Path, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    return path.t_max if t_start is None else t_start, path.t_clean if t_end is None else t_end


def _refuse_ends(name: str, path: Path, t_start: float | None, t_end: float | None) -> None:
    if path.timesteps is None:
        raise ValueError(f"grid {name!r}: got {type(path).__name__}, expected a path with a table of timesteps")
    if t_start is not None or t_end is not None:
        raise ValueError(f"grid {name!r}: got t_start or t_end, expected none: this grid is defined on the whole table")


def _with_clean(
    path: Path, n: int, t_start: float | None, t_end: float | None, space: Callable[[float, float, int], Tensor]
) -> Tensor:
    """space(start, end, n + 1) if t_end is given, else space(t_max, t_min, n) and clean data."""
    start, end = _ends(path, t_start, t_end)
    if t_end is not None:
        return space(start, end, n + 1)
    return F.pad(space(start, path.t_min, n), (0, 1), value=path.t_clean)


def _in_lambda(path: Path, n: int, t_start: float | None, t_end: float | None, rho: float | None = None) -> Tensor:
    """As `_with_clean`, equally spaced in lambda, or in (sigma / alpha)^(1 / rho); both ends are hit exactly."""

    def times(start: float, end: float, count: int) -> Tensor:
        lam = path.lam(_linspace(start, end, 2)).clamp(min=-math.log(RATIO_MAX))
        u = _linspace(0, 1, count)
        if rho is None:
            lam = lam[0] + (lam[1] - lam[0]) * u
        else:
            root = (-lam / rho).exp()
            lam = -rho * (root[0] + (root[1] - root[0]) * u).log()
        inner = F.pad(path.time(lam[1:-1]), (1, 0), value=start)
        return inner if count == 1 else F.pad(inner, (0, 1), value=end)

    return _with_clean(path, n, t_start, t_end, times)
