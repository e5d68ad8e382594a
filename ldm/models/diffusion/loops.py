"""The official sampling loops of latent diffusion: Algorithm 2 on the tables, with every option that they had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models.diffusion.tables import TabledDiffusion, ancestral, at, noise_like
from ldm.modules.distributions import normal_kl
from ldm.util import mean_flat


def first_rows(cond: Any, n: int) -> Any:
    """The first n entries of a condition in any of its official forms."""
    if isinstance(cond, Mapping):
        return {k: first_rows(v, n) for k, v in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [first_rows(c, n) for c in cond]
    return cond if cond is None else cond[:n]


class LatentLoops(TabledDiffusion):
    """Methods of a latent recipe that only downstream code calls; our own sampling is `generate`."""

    first_stage_model: nn.Module
    log_every_t: int
    cond_ids: Tensor
    shorten_cond_schedule: bool

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (scaled - pred_xstart) / at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [B]."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def quantize(self, z: Tensor) -> Tensor:
        """Latents snapped to the first stage's codebook."""
        return self.first_stage_model.quantize(z)[0]

    def p_mean_variance(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool,
        *,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), and x0 on request.

        score_corrector: its `modify_score(model, eps, x, t, c, **corrector_kwargs)` edits the network's output.
        """
        out = self.apply_model(x, t, c)
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise ValueError(f"score_corrector: got parameterization {self.parameterization!r}, expected eps")
            out = score_corrector.modify_score(self, out, x, t, c, **(corrector_kwargs or {}))
        x0 = self.predict_start(x, t, out)
        x0 = x0.clamp(-1.0, 1.0) if clip_denoised else x0
        x0 = self.quantize(x0) if quantize_denoised else x0
        posterior = self.q_posterior(x0, x, t)
        return (*posterior, x0) if return_x0 else posterior

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        *,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step of Algorithm 2; `options` are those of `p_mean_variance`, temperature scales the noise."""
        mean, _, log_variance, x0 = self.p_mean_variance(x, c, t, clip_denoised, return_x0=True, **options)
        noise = noise_like(x, repeat_noise) * temperature
        noise = F.dropout(noise, p=noise_dropout) if noise_dropout > 0 else noise
        x = ancestral(mean, log_variance, t, noise)
        return (x, x0) if return_x0 else x

    def _reverse(
        self,
        x: Tensor,
        cond: Any,
        steps: int,
        mask: Tensor | None,
        x0: Tensor | None,
        temperature: float | Sequence[float] = 1.0,
        verbose: bool = True,
        **options: Any,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(i, x_i, prediction of x0) for i = steps - 1 .. 0; mask 1 = keep what `x0` has there."""
        self.refuse_flow()
        for i in tqdm(reversed(range(steps)), desc="sampling", total=steps, disable=not verbose):
            t = torch.full((len(x),), i, device=x.device)
            c = self.q_sample(cond, self.cond_ids[t], torch.randn_like(cond)) if self.shorten_cond_schedule else cond
            heat = temperature if isinstance(temperature, (int, float)) else temperature[i]
            x, start = self.p_sample(x, c, t, self.clip_denoised, return_x0=True, temperature=heat, **options)
            if mask is not None:
                x = self.q_sample(x0, t) * mask + (1.0 - mask) * x
            yield i, x, start

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Any,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,  # noqa: N803
        verbose: bool = True,
        callback: Callable[[int], object] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        start_T: int | None = None,  # noqa: N803
        log_every_t: int | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Latents of this shape from noise by the last `timesteps` steps; every `log_every_t`-th state on request."""
        x = noise = torch.randn(tuple(shape), device=self.betas.device) if x_T is None else x_T
        steps = min(timesteps or self.num_timesteps, start_T or self.num_timesteps)
        every, states = log_every_t or self.log_every_t, [noise]
        for i, x, _ in self._reverse(
            noise, cond, steps, mask, x0, verbose=verbose, quantize_denoised=quantize_denoised
        ):
            if i % every == 0 or i == steps - 1:
                states.append(x)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x, i)
        return (x, states) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Any,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], object] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], object] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,  # noqa: N803
        start_T: int | None = None,  # noqa: N803
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `p_sample_loop`, returning the predictions of x0 on the way. With batch_size, shape is [C, h, w]."""
        shape = tuple(shape) if batch_size is None else (batch_size, *shape)
        cond = first_rows(cond, shape[0])
        x = noise = torch.randn(shape, device=self.betas.device) if x_T is None else x_T
        steps, every = min(start_T or self.num_timesteps, self.num_timesteps), log_every_t or self.log_every_t
        options = {"quantize_denoised": quantize_denoised, "noise_dropout": noise_dropout}
        options |= {"score_corrector": score_corrector, "corrector_kwargs": corrector_kwargs}
        starts = []
        for i, x, start in self._reverse(noise, cond, steps, mask, x0, temperature, verbose, **options):
            if i % every == 0 or i == steps - 1:
                starts.append(start)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x, i)
        return x, starts
