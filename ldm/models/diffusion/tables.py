"""The official tables of a discrete diffusion, what is computed from them, and the path that samplers use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser, to_x0
from ldm.diffusion.schedule import (
    FlowPath,
    Path,
    VPPath,
    ddpm_buffers,
    expand,
    make_beta_schedule,
    rescale_betas_zero_snr,
)
from ldm.models.diffusion.sampling import SeededSampling
from ldm.models.framework import rank_zero_info


def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table [T] at t [B], as [B, 1, ...] to go with x [B, ...]."""
    return expand(table[t], x.ndim)


def noise_like(x: Tensor, repeat: bool = False) -> Tensor:
    """Normal noise of x's shape; repeat: the same for the whole batch."""
    if repeat:
        return torch.randn((1, *x.shape[1:]), device=x.device).expand_as(x)
    return torch.randn(x.shape, device=x.device)


def ancestral(mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Algorithm 2, line 4: mean + sigma z, without noise where t = 0."""
    return mean + expand((t != 0).to(mean), mean.ndim) * (0.5 * log_variance).exp() * noise


class TabledDiffusion(SeededSampling):
    """A recipe with the DDPM paper's tables as buffers under their official names.

    Subclasses set the attributes below before `register_schedule`, and write `apply_model(x_t, t, cond)`.
    """

    parameterization: str
    zero_terminal_snr: bool
    model: nn.Module

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Registers the buffers [T]; all but `lvlb_weights` are in the state dict."""
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        if self.zero_terminal_snr:
            betas = rescale_betas_zero_snr(betas)
        self.num_timesteps, self.linear_start, self.linear_end = len(betas), linear_start, linear_end
        self._register_tables(betas)

    def _register_tables(self, betas: np.ndarray) -> None:
        kind = "v" if self.parameterization == "flow" else self.parameterization  # flow never reads the tables
        tables = ddpm_buffers(betas, self.v_posterior, kind)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=name != "lvlb_weights")
        self._betas, self._table_names = betas, tuple(tables)
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """x_t = alpha_t x0 + sigma_t n, in float64 whatever the precision of the weights."""
        if self._path is None:
            flow = self.parameterization == "flow"
            self._path = FlowPath() if flow else VPPath(np.cumprod(1 - self._betas))
        return self._path

    @property
    def denoiser(self) -> Denoiser:
        """(x_t, t, **condition) -> x0."""
        return Denoiser(lambda x, t, **cond: self.apply_model(x, t, cond), self.path, self.parameterization)

    # --- q: adding noise ----------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """q(x_t | x_0), eq. 4. x_start, noise [B, ...], t [B] -> x_t [B, ...]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.parameterization == "flow":
            return self.path.add_noise(x_start, noise, t)
        signal = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return signal + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        mean = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = at(1.0 - self.alphas_cumprod, t, x_start)
        return mean, variance, at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eq. 6-7."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t), at(self.posterior_log_variance_clipped, t, x_t)

    # --- p: removing noise --------------------------------------------------------------------------------------------

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and its noise: eq. 4 solved for x_0."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return scaled - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_start(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """x_0 from x_t and the network's output."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x_t, t, out)
        alpha, sigma = at(self.sqrt_alphas_cumprod, t, x_t), at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return to_x0(self.parameterization, out, x_t, alpha, sigma)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, clip_denoised: bool, cond: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t)."""
        x0 = self.predict_start(x, t, self.apply_model(x, t, cond))
        return self.q_posterior(x0.clamp(-1.0, 1.0) if clip_denoised else x0, x, t)

    def restart_ema(self) -> None:
        """The average starts anew at the present weights."""
        if self.use_ema:
            self.init_ema(self.model, float(self.model_ema.decay))


def after_loading(module: TabledDiffusion, incompatible: Any) -> None:
    """What a state dict leaves to do, by whatever function it was loaded.

    A file without averaged weights would leave the average at the weights of construction: it restarts at the loaded
    ones. The path follows the file's noise schedule, which the network was trained with.
    """
    missing = set(incompatible.missing_keys)
    if module.use_ema and any(k.startswith("model_ema.") for k in missing):
        module.restart_ema()
        rank_zero_info("no averaged weights in the file: the average starts at the weights that were loaded")
    table = module.alphas_cumprod
    if "alphas_cumprod" in missing or table.is_meta:
        return
    if table.dtype != torch.float32:  # a file in half precision whose tensors were assigned
        module._register_tables(module._betas)
        module.to(table.device)
        return
    own = np.cumprod(1 - module._betas)
    if not np.allclose(table.double().cpu().numpy(), own, atol=1e-5):
        rank_zero_info("the file's noise schedule is not that of the config: sampling follows the file")
        module._betas, module._path = module.betas.double().cpu().numpy(), None
