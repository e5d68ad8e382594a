"""The noise schedule and the model wrapper of the DPM-Solver authors' code: continuous time around any network.

After LuChengTHU/dpm-solver (MIT licence); `dpm_solver.py` has the solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> noise [B, ...]


def known(name: str, value: Any, names: Sequence[Any]) -> None:
    """Raises ValueError for a value that is none of `names`."""
    if value not in names:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, names))}")


def expand_dims(v: Tensor, dims: int) -> Tensor:
    """[B] -> [B, 1, ...] with `dims` axes."""
    return v[(...,) + (None,) * (dims - 1)]


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """The piecewise linear function through (xp, yp), its first and last piece continued; differentiable.

    x [N, C], xp and yp [C or 1, K] with ascending xp -> [N, C].
    """
    xp, yp = (p.expand(x.shape[1], -1).contiguous() for p in (xp, yp))
    right = torch.searchsorted(xp, x.detach().t().contiguous()).clamp(1, xp.shape[1] - 1)  # [C, N]
    x0, x1, y0, y1 = (p.gather(1, i) for p in (xp, yp) for i in (right - 1, right))
    return (y0 + (x.t() - x0) * (y1 - y0) / (x1 - x0)).t()


class NoiseScheduleVP:
    """x_t = alpha_t x_0 + sigma_t n with alpha^2 + sigma^2 = 1, for continuous t, and lambda = log(alpha / sigma).

    Args:
        schedule: discrete (from betas or alphas_cumprod [N]; step n is t = (n + 1) / N), linear or cosine.
        continuous_beta_0, continuous_beta_1: of linear, beta(t) = beta_0 + t (beta_1 - beta_0).
    """

    def __init__(
        self,
        schedule: str = "discrete",
        betas: Tensor | None = None,
        alphas_cumprod: Tensor | None = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ) -> None:
        known("schedule", schedule, ("discrete", "linear", "cosine"))
        self.schedule, self.T, self.total_N = schedule, 1.0, 1000
        self.beta_0, self.beta_1 = continuous_beta_0, continuous_beta_1
        if schedule == "discrete":
            if betas is None and alphas_cumprod is None:
                raise ValueError("schedule discrete: got neither betas nor alphas_cumprod, expected one of them")
            log_alphas = (1 - betas).log().cumsum(0) if betas is not None else alphas_cumprod.log()
            self.total_N = len(log_alphas)
            self.t_array = torch.linspace(0.0, 1.0, self.total_N + 1)[1:].reshape(1, -1).to(log_alphas)
            self.log_alpha_array = 0.5 * log_alphas.reshape(1, -1)
        elif schedule == "cosine":
            self.cosine_s, beta_max = 0.008, 999.0
            self.cosine_t_max = math.atan(beta_max * (1 + self.cosine_s) / math.pi) * self._cosine_scale - self.cosine_s
            self.cosine_log_alpha_0 = math.log(math.cos(self.cosine_s / (1 + self.cosine_s) * math.pi / 2))
            self.T = 0.9946  # beyond it the numbers are too small for float32

    @property
    def _cosine_scale(self) -> float:
        return 2 * (1 + self.cosine_s) / math.pi

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """log(alpha_t), [B] -> [B]."""
        if self.schedule == "discrete":
            t_array, log_alphas = self.t_array.to(t.device), self.log_alpha_array.to(t.device)
            return interpolate_fn(t.reshape(-1, 1), t_array, log_alphas).reshape(-1)
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return torch.log(torch.cos((t + self.cosine_s) / self._cosine_scale)) - self.cosine_log_alpha_0

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """alpha_t."""
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t: Tensor) -> Tensor:
        """sigma_t."""
        return torch.sqrt(1.0 - torch.exp(2.0 * self.marginal_log_mean_coeff(t)))

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t) - log(sigma_t), half the logarithm of the signal-to-noise ratio."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * torch.log(1.0 - torch.exp(2.0 * log_alpha))

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """The time t in [0, T] of a lambda."""
        if self.schedule == "linear":
            tmp = 2.0 * (self.beta_1 - self.beta_0) * torch.logaddexp(-2.0 * lamb, torch.zeros_like(lamb))
            return tmp / (torch.sqrt(self.beta_0**2 + tmp) + self.beta_0) / (self.beta_1 - self.beta_0)
        log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(lamb), -2.0 * lamb)
        if self.schedule == "cosine":
            return torch.arccos(torch.exp(log_alpha + self.cosine_log_alpha_0)) * self._cosine_scale - self.cosine_s
        log_alphas, t_array = (a.to(lamb.device).flip(1) for a in (self.log_alpha_array, self.t_array))
        return interpolate_fn(log_alpha.reshape(-1, 1), log_alphas, t_array).reshape(-1)


def to_noise(model_type: str, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise in x = alpha x_0 + sigma n that the output of a network of this type stands for."""
    if model_type == "x_start":
        return (x - alpha * out) / sigma
    if model_type == "v":
        return alpha * out + sigma * x
    return -sigma * out if model_type == "score" else out


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: dict[str, Any] | None = None,
    guidance_type: str = "uncond",
    condition: Any = None,
    unconditional_condition: Any = None,
    guidance_scale: float = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: dict[str, Any] | None = None,
) -> ModelFn:
    """(x [B, ...], continuous t [B] or [1]) -> predicted noise [B, ...].

    Args:
        model: (x, t_input[, condition], **model_kwargs) -> what model_type says. Of a discrete schedule, t_input runs
            from 0 to 999 for t from 1 / N to 1; else it is t.
        model_type: noise, x_start, v, or score.
        guidance_type: uncond; classifier (by the gradient of classifier_fn(x, t_input, condition,
            **classifier_kwargs) [B], Dhariwal & Nichol 2021); or classifier-free (Ho & Salimans 2021).
    """
    known("model_type", model_type, ("noise", "x_start", "v", "score"))
    known("guidance_type", guidance_type, ("uncond", "classifier", "classifier-free"))
    if guidance_type == "classifier" and classifier_fn is None:
        raise ValueError("guidance_type classifier: got no classifier_fn, expected (x, t, condition) -> [B]")

    def input_time(t: Tensor) -> Tensor:
        return (t - 1.0 / noise_schedule.total_N) * 1000.0 if noise_schedule.schedule == "discrete" else t

    def noise_of(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        args = (x, input_time(t)) if cond is None else (x, input_time(t), cond)
        out = model(*args, **(model_kwargs or {}))
        alpha, sigma = (expand_dims(f(t), x.ndim) for f in (noise_schedule.marginal_alpha, noise_schedule.marginal_std))
        return to_noise(model_type, out, x, alpha, sigma)

    def classifier_gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_prob = classifier_fn(x_in, input_time(t), condition, **(classifier_kwargs or {}))
            return torch.autograd.grad(log_prob.sum(), x_in)[0]

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1).expand(len(x))
        if guidance_type == "uncond":
            return noise_of(x, t)
        if guidance_type == "classifier":
            sigma = expand_dims(noise_schedule.marginal_std(t), x.ndim)
            return noise_of(x, t) - guidance_scale * sigma * classifier_gradient(x, t)
        if guidance_scale == 1.0 or unconditional_condition is None:
            return noise_of(x, t, condition)
        both = torch.cat([unconditional_condition, condition])
        uncond, cond = noise_of(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return model_fn
