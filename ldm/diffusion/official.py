"""DDIMSampler, PLMSSampler and DPMSolverSampler with the interface and the numbers of CompVis' classes.

Thin: the steps are those of samplers.py. What is added is what callers of these classes can see: the `uniform` and
`quad` grids with their traps (schedule.py), the logged intermediates, and torch.randn called as often and in the same
order, so that a seed gives the same picture (the originals draw noise at every step, even where its weight is 0).
A model is anything with num_timesteps, betas, alphas_cumprod and apply_model(x [B, C, H, W], t [B], c).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, cfg, inpaint
from ldm.diffusion.samplers import ddim, dpmpp_2m, plms
from ldm.diffusion.schedule import VPPath, ddim_timesteps, expand, make_grid

log = logging.getLogger(__name__)


class _OfficialSampler:
    """A model and its noise path."""

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        self.model, self.schedule = model, schedule
        self.ddpm_num_timesteps: int = model.num_timesteps
        self.path = VPPath(model.alphas_cumprod)

    def _denoise(self, c: Any, scale: float, uncond: Any, whole_times: bool = True) -> Denoise:
        """Guided x0 prediction for any condition that apply_model takes."""

        def net(x: Tensor, t: Tensor, c: Any) -> Tensor:
            return self.model.apply_model(x, t.long() if whole_times else t, c)

        denoise = Denoiser(net, self.path, getattr(self.model, "parameterization", "eps"))
        return cfg(denoise, {"c": c}, None if uncond is None else {"c": uncond}, scale)

    def _start(self, x_T: Tensor | None, batch_size: int, shape: Sequence[int]) -> Tensor:
        return torch.randn((batch_size, *shape), device=self.model.betas.device) if x_T is None else x_T

    def _project(self, mask: Tensor | None, x0: Tensor | None) -> Callable[[Tensor, Tensor], Tensor] | None:
        if mask is None:
            return None
        if x0 is None:
            raise ValueError("mask: got no x0, expected the image whose masked part is to be kept")
        return inpaint(self.path, x0, mask, torch.randn_like)


class DDIMSampler(_OfficialSampler):
    """`sample(S, batch_size, shape, conditioning, ...) -> (samples [B, C, H, W], intermediates)`.

    Also the two halves of image to image: `stochastic_encode` and `decode`.
    """

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Sets the official tables: ddim_timesteps, ddim_alphas, ddim_alphas_prev, ddim_sigmas, ..., each [steps]."""
        self.ddim_eta = ddim_eta
        self.grid = make_grid(ddim_discretize, self.path, ddim_num_steps)
        abar = self.model.alphas_cumprod.detach().cpu().numpy()
        self.ddim_timesteps = self.grid[:-1].flip(0).long().numpy()
        sigmas, alphas, self.ddim_alphas_prev = make_ddim_sampling_parameters(abar, self.ddim_timesteps, ddim_eta)
        self.ddim_sigmas, self.ddim_alphas = torch.as_tensor(sigmas), torch.as_tensor(alphas)
        self.ddim_sqrt_one_minus_alphas = (1 - self.ddim_alphas).sqrt()
        original = _ddim_sigmas(abar, np.append(1.0, abar[:-1]), ddim_eta)
        self.ddim_sigmas_for_original_num_steps = torch.as_tensor(original, dtype=torch.float32)
        if verbose:
            log.info("DDIM timesteps %s, eta %s", self.ddim_timesteps, ddim_eta)

    @torch.no_grad()
    def sample(
        self,
        S: int,  # steps asked of the `uniform` grid
        batch_size: int,
        shape: Sequence[int],  # [C, H, W]
        conditioning: Any = None,  # whatever apply_model takes
        callback: Callable[[int], object] | None = None,  # called with the step
        normals_sequence: None = None,  # never used by the original either
        img_callback: Callable[[Tensor, int], object] | None = None,  # called with x0 and the step
        quantize_x0: bool = False,  # snap x0 to the first stage's codebook
        eta: float = 0.0,
        mask: Tensor | None = None,  # 1 = keep x0
        x0: Tensor | None = None,
        temperature: float = 1.0,  # scales the noise
        noise_dropout: float = 0.0,  # share of the noise that is dropped
        score_corrector: Any = None,  # .modify_score(model, eps, x, t, c, **corrector_kwargs) -> eps
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,  # None: torch.randn
        log_every_t: int = 100,  # in steps of the grid
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        return self.ddim_sampling(
            conditioning, (batch_size, *shape), x_T, callback=callback, img_callback=img_callback,
            quantize_denoised=quantize_x0, mask=mask, x0=x0, temperature=temperature, noise_dropout=noise_dropout,
            score_corrector=score_corrector, corrector_kwargs=corrector_kwargs, log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )  # fmt: skip

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],  # [B, C, H, W]
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,  # all T of them
        callback: Callable[[int], object] | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """`sample` on the schedule that `make_schedule` set, `quad` for instance."""
        x = self._start(x_T, shape[0], shape[1:])
        grid = self._grid(ddim_use_original_steps)
        denoise = self._denoise(cond, unconditional_guidance_scale, unconditional_conditioning)
        if score_corrector is not None:
            denoise = self._corrected(denoise, score_corrector, cond, corrector_kwargs or {})
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        total = len(grid) - 1

        def randn(like: Tensor) -> Tensor:
            noise = torch.randn(like.shape, device=like.device) * temperature
            return F.dropout(noise, noise_dropout) if noise_dropout > 0 else noise

        def after_step(i: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
            for _ in range(self._idle_draws(i)):
                randn(x)
            if quantize_denoised:
                snapped = self.model.first_stage_model.quantize(x0)[0]
                x.add_(self.path.alpha(t) * (snapped - x0))  # the noise part of x stays that of the unsnapped x0
                x0 = snapped
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x0, i)
            if (total - i - 1) % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(x0)

        x = self._run(denoise, x, grid, randn, self._project(mask, x0), after_step)
        return x, intermediates

    def _grid(self, original_steps: bool) -> Tensor:
        return torch.arange(self.ddpm_num_timesteps - 1, -2, -1.0) if original_steps else self.grid

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 [B, ...] noised to index t [B] of the schedule (a last index too many, strength 1, means the last)."""
        noise = torch.randn_like(x0) if noise is None else noise
        times = torch.arange(self.ddpm_num_timesteps) if use_original_steps else torch.as_tensor(self.ddim_timesteps)
        t = times.to(t.device)[t.clamp(max=len(times) - 1)]
        return self.path.add_noise(x0, noise, t.to(x0.dtype))

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,  # steps to take
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """The last t_start steps of the schedule, from x_latent [B, C, H, W]."""
        grid = self._grid(use_original_steps)
        denoise = self._denoise(cond, unconditional_guidance_scale, unconditional_conditioning)

        def randn(like: Tensor) -> Tensor:
            return torch.randn(like.shape, device=like.device)

        def after_step(i: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
            for _ in range(self._idle_draws(i)):
                randn(x)

        return self._run(denoise, x_latent, grid[-1 - t_start :].double(), randn, None, after_step)

    def _run(self, denoise: Denoise, x: Tensor, grid: Tensor, randn: Any, project: Any, callback: Any) -> Tensor:
        return ddim(
            denoise, x, grid, path=self.path, randn=randn, project=project, callback=callback, eta=self.ddim_eta
        )

    def _idle_draws(self, i: int) -> int:
        """How often the original draws noise of weight 0 in step i."""
        return 1 if self.ddim_eta == 0 else 0

    def _corrected(self, denoise: Denoise, corrector: Any, c: Any, options: dict[str, Any]) -> Denoise:
        def corrected(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            times = t.to(x.device).long().expand(len(x))
            eps = corrector.modify_score(self.model, (x - alpha * denoise(x, t)) / sigma, x, times, c, **options)
            return (x - sigma * eps) / alpha

        return corrected


class PLMSSampler(DDIMSampler):
    """As DDIMSampler, by pseudo linear multistep; eta must be 0 (ValueError)."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        if ddim_eta != 0:
            raise ValueError(f"PLMS eta: got {ddim_eta}, expected 0: PLMS is deterministic")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    plms_sampling = DDIMSampler.ddim_sampling

    def _run(self, denoise: Denoise, x: Tensor, grid: Tensor, randn: Any, project: Any, callback: Any) -> Tensor:
        return plms(denoise, x, grid, path=self.path, randn=randn, project=project, callback=callback)

    def _idle_draws(self, i: int) -> int:
        return 2 if i == 0 else 1  # the first step is computed twice


class DPMSolverSampler(_OfficialSampler):
    """DPM-Solver++(2M) on times equally spaced from T - 1 to 0, fractional ones included."""

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],  # [C, H, W]
        conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, None]:
        """-> (samples [B, C, H, W], None). The original ignores everything about noise and masks; here a mask works,
        and what a deterministic solver cannot use is named in a warning."""
        unused = {"eta": eta, "noise_dropout": noise_dropout, "quantize_x0": quantize_x0}
        unused["score_corrector"] = score_corrector
        for name in [name for name, value in unused.items() if value]:
            log.warning("DPM-Solver does not use %s", name)

        def after_step(i: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x0, i)

        samples = dpmpp_2m(
            self._denoise(conditioning, unconditional_guidance_scale, unconditional_conditioning, whole_times=False),
            self._start(x_T, batch_size, shape),
            make_grid("linspace", self.path, S, t_end=self.path.t_min),
            path=self.path,
            randn=torch.randn_like,
            project=self._project(mask, x0),
            callback=after_step,
            lower_order_final=S < 15,
        )
        return samples, None


# ------------------------------------------------------------------- functions of ldm.modules.diffusionmodules.util


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Ascending timesteps of the grid `uniform` or `quad`, see `schedule.ddim_timesteps`."""
    times = ddim_timesteps(ddim_discr_method, num_ddim_timesteps, num_ddpm_timesteps)
    if verbose:
        log.info("DDIM timesteps %s", times)
    return times


def make_ddim_sampling_parameters(
    alphacums: np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas, alphas, alphas_prev) of the steps; alphas are cumulative, and the last step stops at alphacums[0]."""
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.append(alphacums[0], alphacums[ddim_timesteps[:-1]]).astype(np.float64)
    sigmas = _ddim_sigmas(alphas, alphas_prev, eta)
    if verbose:
        log.debug("DDIM eta %s, sigmas %s", eta, sigmas)
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """The table a [T] at t [B], as [B, 1, ...] to go with a tensor of shape x_shape."""
    return expand(a.gather(-1, t), len(x_shape))


def noise_like(shape: Sequence[int], device: Any = None, repeat: bool = False) -> Tensor:
    """Normal noise; repeat: the same for the whole batch."""
    if not repeat:
        return torch.randn(tuple(shape), device=device)
    return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *[1] * (len(shape) - 1))


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """float64 betas [T] of any decreasing alpha_bar(t in [0, 1]) (Nichol & Dhariwal 2021)."""
    abar = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - abar[1:] / abar[:-1], max_beta)


def _ddim_sigmas(alphas: np.ndarray, alphas_prev: np.ndarray, eta: float) -> np.ndarray:
    """DDIM eq. 16 (alphas: cumulative)."""
    alphas, alphas_prev = np.float64(alphas), np.float64(alphas_prev)
    return eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
