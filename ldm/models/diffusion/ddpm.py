"""Pixel-space diffusion: the recipe of "Denoising Diffusion Probabilistic Models" (Ho et al. 2020).

Training (Algorithm 1) is `forward` -> `p_losses`; sampling is `sample(seeds=...)`, any row of `SAMPLERS` over the
`Denoiser`. The official methods (`p_sample`, `p_sample_loop`, ...) are Algorithm 2 on the official tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser, to_x0
from ldm.diffusion.guidance import cfg, clip, inpaint
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import (
    FlowPath,
    Path,
    VPPath,
    ddpm_buffers,
    make_beta_schedule,
    make_grid,
    rescale_betas_zero_snr,
    slice_grid,
)
from ldm.models.base import BaseModel
from ldm.util import SeededNoise, UserError, image_grid, instantiate_from_config, suggest

Condition = Mapping[str, Any]  # c_concat, c_crossattn, y: tensors [B, ...]; `uncond`: the same for guidance
PARAMETERIZATIONS = ("eps", "x0", "v", "flow")
_IN_LATENT = ("LatentDiffusion", "Layout2ImgDiffusion")


def __getattr__(name: str) -> Any:
    """The latent recipes under their official module name; imported late, since they build on DDPM."""
    if name in _IN_LATENT:
        from ldm.models.diffusion import latent_diffusion

        return getattr(latent_diffusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _joined(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """A condition as one tensor: official callers pass lists, which are joined along axis 1."""
    return parts if isinstance(parts, Tensor) else parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class DiffusionWrapper(nn.Module):
    """Feeds a condition to the network where it belongs.

    Args:
        diff_model_config: `{target, params}` of the network, kept as `diffusion_model`.
        conditioning_key: None (conditions are ignored), concat (to the input's channels), crossattn (as context),
            hybrid (both) or adm (as `y`).

    Raises:
        ValueError: unknown conditioning_key, or a condition that it needs is absent.
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm")

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in self.KEYS:
            raise ValueError(f"conditioning_key: got {conditioning_key!r}, expected one of {self.KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | Sequence[Tensor] | None = None,
        c_crossattn: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], t [B] -> the network's output. Official callers give `y` as `c_crossattn`."""
        key = self.conditioning_key
        if key is None:
            return self.diffusion_model(x, t)
        if key == "adm":
            y = c_crossattn if y is None else y
            return self.diffusion_model(x, t, y=_joined(self._needed("y", y)))
        if key in ("concat", "hybrid"):
            x = torch.cat([x, _joined(self._needed("c_concat", c_concat)).to(x)], dim=1)
        if key == "concat":
            return self.diffusion_model(x, t)
        return self.diffusion_model(x, t, context=_joined(self._needed("c_crossattn", c_crossattn)))

    def _needed(self, name: str, value: Any) -> Any:
        if value is None:
            raise ValueError(f"conditioning_key {self.conditioning_key!r}: got no {name}, expected a tensor")
        return value


class DDPM(BaseModel):
    """Diffusion on pictures; the official constructor parameters first, in their order.

    Args:
        unet_config: `{target, params}` of the network.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: the schedule, see
            `make_beta_schedule`; given_betas replaces it.
        loss_type: l2 or l1.
        load_only_unet: `ckpt_path` holds (or is read only for) the network.
        first_stage_key: where the batch keeps the pictures.
        image_size: height and width to sample, one number or two.
        log_every_t: which states the official loops return.
        clip_denoised: keep x0 in [-1, 1] while sampling.
        original_elbo_weight, l_simple_weight: total = l_simple_weight * simple + original_elbo_weight * vlb.
        v_posterior: posterior variance (1 - v) beta~ + v beta.
        conditioning_key: see DiffusionWrapper; None becomes adm where there is a cond_stage_key.
        parameterization: what the network predicts: eps, x0, v, or flow (rectified flow, continuous time in [0, 1]).
        use_positional_encodings: never worked in the official code; only False.
        learn_logvar, logvar_init: a learned weight per timestep, loss / exp(logvar_t) + logvar_t.
        cond_stage_key: where the batch keeps the class labels; None = unconditional.
        num_classes: gives the network its `num_classes` (and one more, the null class, with cond_dropout); None = as
            the network's own params say, the null class included.
        cond_dropout: chance to replace a label by the null class in training, which makes guidance possible.
        loss_weight: uniform, min_snr (with min_snr_gamma), or another row of `LOSS_WEIGHTS`.
        offset_noise: standard deviation of noise that is constant over a channel (0.1 is usual).
        zero_terminal_snr: rescale the betas so that x_T is pure noise (Lin et al. 2023); needs x0 or v.
        ema_decay: of the averaged weights.

    Raises:
        UserError: parameters that do not go together.
    """

    # absent or present by age of the file; what a missing average means is said in `_after_loading`
    tolerated_keys: tuple[str, ...] = ("model_ema.", "lvlb_weights", "logvar", "scale_factor", "ddim_")

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        *,
        cond_stage_key: str | None = None,
        num_classes: int | None = None,
        cond_dropout: float = 0.0,
        loss_weight: str = "uniform",
        min_snr_gamma: float = 5.0,
        offset_noise: float = 0.0,
        zero_terminal_snr: bool = False,
        ema_decay: float = 0.9999,
        optimizer_config: Mapping[str, Any] | None = None,
        compile: bool | str = False,  # noqa: A002
    ) -> None:
        super().__init__(
            monitor=monitor,
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            optimizer_config=optimizer_config,
            scheduler_config=scheduler_config,
            compile=compile,
        )
        self.loss_type, self.parameterization, self.load_only_unet = loss_type, parameterization, load_only_unet
        self.first_stage_key, self.cond_stage_key, self.cond_dropout = first_stage_key, cond_stage_key, cond_dropout
        self.image_size, self.channels, self.log_every_t = image_size, channels, log_every_t
        self.clip_denoised, self.v_posterior = clip_denoised, v_posterior
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.loss_weight, self.min_snr_gamma, self.offset_noise = loss_weight, min_snr_gamma, offset_noise
        self.zero_terminal_snr, self.learn_logvar = zero_terminal_snr, learn_logvar
        self._check_options(use_positional_encodings)
        if cond_stage_key is not None and conditioning_key is None:
            conditioning_key = "adm"
        unet_config, self.num_classes = self._with_classes(unet_config, num_classes)
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.init_ema(self.model, ema_decay)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self._init_logvar(logvar_init)
        self.register_load_state_dict_post_hook(_after_loading)
        if type(self) is DDPM:
            self.load_ckpt_path()

    def _check_options(self, use_positional_encodings: bool) -> None:
        for name, value, known in (
            ("parameterization", self.parameterization, PARAMETERIZATIONS),
            ("loss_type", self.loss_type, ("l1", "l2")),
            ("loss_weight", self.loss_weight, ("uniform", *LOSS_WEIGHTS)),
        ):
            if value not in known:
                raise UserError(f"{name}: got {value!r}{suggest(str(value), known)}, expected one of {', '.join(known)}")
        if use_positional_encodings:
            raise UserError("use_positional_encodings: true was never implemented (compute_latent_shifts is missing)")
        if self.zero_terminal_snr and self.parameterization not in ("x0", "v"):
            raise UserError(
                f"zero_terminal_snr needs parameterization x0 or v, got {self.parameterization}: "
                "where x_T is pure noise, the noise says nothing about the picture"
            )
        if self.parameterization == "flow" and (self.learn_logvar or self.original_elbo_weight):
            raise UserError("parameterization flow has no timesteps: learn_logvar and original_elbo_weight do not apply")
        if not 0 <= self.cond_dropout < 1:
            raise UserError(f"cond_dropout: got {self.cond_dropout}, expected a probability below 1")

    def _with_classes(
        self, unet_config: Mapping[str, Any], num_classes: int | None
    ) -> tuple[Mapping[str, Any], int | None]:
        """The network's config with its number of classes filled in, and the number without the null class."""
        params = dict(unet_config.get("params") or {})
        null, own = int(self.cond_dropout > 0), params.get("num_classes")
        if num_classes is None:
            return unet_config, own - null if isinstance(own, int) else None
        if own not in (None, num_classes + null):
            raise UserError(
                f"num_classes: {num_classes} for the model{' and a null class' * null}, but {own} in unet_config"
            )
        return {**unet_config, "params": {**params, "num_classes": num_classes + null}}, num_classes

    def _init_logvar(self, value: float) -> None:
        logvar = torch.full((self.num_timesteps,), float(value))
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    # --- schedule -----------------------------------------------------------------------------------------------------

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Registers the official buffers [T] (all but `lvlb_weights` are in the state dict)."""
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        if self.zero_terminal_snr:
            betas = rescale_betas_zero_snr(betas)
        self.num_timesteps, self.linear_start, self.linear_end = len(betas), linear_start, linear_end
        self._register_tables(betas)

    def _register_tables(self, betas: np.ndarray) -> None:
        kind = "v" if self.parameterization == "flow" else self.parameterization
        tables = ddpm_buffers(betas, self.v_posterior, kind)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=name != "lvlb_weights")
        self._table_names = tuple(tables)
        self._abar = np.cumprod(1 - betas)
        self._path: Path | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DDPM:
        """Follows `.to(...)`, but the tables keep full precision: in bfloat16, abar_0 = 0.9999 would be 1."""
        before = {n: b for n, b in self._buffers.items() if n in (*self._table_names, "logvar", "scale_factor")}
        super()._apply(fn, recurse)
        for name, table in before.items():
            if self._buffers[name].dtype != table.dtype:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    @property
    def path(self) -> Path:
        """x_t = alpha_t x0 + sigma_t n, for samplers and targets; in float64 whatever the precision of the weights."""
        if self._path is None:
            self._path = FlowPath() if self.parameterization == "flow" else VPPath(self._abar)
        return self._path

    @property
    def denoiser(self) -> Denoiser:
        """(x_t, t, **condition) -> x0."""
        return Denoiser(lambda x, t, **cond: self.apply_model(x, t, cond), self.path, self.parameterization)

    def networks(self) -> list[nn.Module]:
        return [self.model]

    # --- q: noising ---------------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """q(x_t | x_0), eq. 4. x_start, noise [B, ...], t [B] -> x_t [B, ...]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.parameterization == "flow":
            return self.path.add_noise(x_start, noise, t)
        return _at(self.sqrt_alphas_cumprod, t, x_start) * x_start + (
            _at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        mean = _at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = _at(1.0 - self.alphas_cumprod, t, x_start)
        return mean, variance, _at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eq. 6-7."""
        mean = _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, _at(self.posterior_variance, t, x_t), _at(self.posterior_log_variance_clipped, t, x_t)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and its noise, eq. 4 solved for x_0."""
        return _at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - (
            _at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise
        )

    # --- p: the official sampling loop --------------------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """The network's output for x_t [B, C, H, W], t [B]."""
        if self.parameterization == "flow":
            t = t * 1000  # the time embedding was made for indices
        return self.model(x_noisy, t, **(cond or {}))

    def _start_of(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Network output -> x0 at table index t."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x, t, out)
        alpha, sigma = _at(self.sqrt_alphas_cumprod, t, x), _at(self.sqrt_one_minus_alphas_cumprod, t, x)
        return to_x0(self.parameterization, out, x, alpha, sigma)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, clip_denoised: bool, cond: Condition | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t)."""
        x0 = self._start_of(self.apply_model(x, t, cond), x, t)
        return self.q_posterior(x0.clamp(-1.0, 1.0) if clip_denoised else x0, x, t)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        repeat_noise: bool = False,
        cond: Condition | None = None,
    ) -> Tensor:
        """One step of Algorithm 2; repeat_noise: one noise for the whole batch."""
        mean, _, log_variance = self.p_mean_variance(x, t, clip_denoised, cond)
        return _ancestral(mean, log_variance, t, noise_like(x, repeat_noise))

    @torch.no_grad()
    def p_sample_loop(
        self, shape: Sequence[int], return_intermediates: bool = False, cond: Condition | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Algorithm 2 from x_T ~ N(0, I) of this shape; every `log_every_t`-th state on request."""
        self._refuse_flow()
        x = torch.randn(tuple(shape), device=self.betas.device)
        states = [x]
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x = self.p_sample(x, t, clip_denoised=self.clip_denoised, cond=cond)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                states.append(x)
        return (x, states) if return_intermediates else x

    def _refuse_flow(self) -> None:
        if self.parameterization == "flow":
            raise UserError("parameterization flow has no official sampling loop: call sample(seeds=[...])")

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Condition | int | None = None,
        return_intermediates: bool = False,
        batch_size: int = 16,
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 50,
        sampler: str = "ddim",
        grid: str | None = None,
        eta: float | None = None,
        scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        callback: Callable[[int, Tensor, Tensor, Tensor], object] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Pictures [len(seeds), C, H, W] in [-1, 1], each drawn from its own seed.

        Without seeds this is the official `sample(batch_size, return_intermediates)`: all T steps, global generator.

        Args:
            cond: from `condition` or `get_cond`; its entry `uncond` is needed for scale != 1.
            steps, sampler, grid: network steps, a row of SAMPLERS, a row of GRIDS (None = the path's default).
            eta: share of fresh noise, for the samplers that have it; None = the sampler's default.
            scale: classifier-free guidance.
            height, width: of the pictures; None = image_size.
            mask, x0: [n, 1, H, W] (1 = keep) and the picture [n, C, H, W] to keep from.
            strength: below 1, start from x0 noised this far (image to image).
            callback: (step, time, x_t, x0) after every step; a true result stops.

        Raises:
            UserError: unknown sampler or grid, or knobs that do not apply.
        """
        size = (height or _pair(self.image_size)[0], width or _pair(self.image_size)[1])
        if seeds is None:
            n = cond if isinstance(cond, int) else batch_size
            return self.p_sample_loop(
                (n, self.channels, *size), return_intermediates, cond if isinstance(cond, Mapping) else None
            )
        x = self._generate(
            cond, seeds, size, steps, sampler, grid, eta=eta, scale=scale, mask=mask, x0=x0, strength=strength,
            callback=callback,
        )  # fmt: skip
        return x.clamp(-1, 1)

    def _generate(
        self,
        cond: Condition | None,
        seeds: Sequence[int],
        size: tuple[int, int],
        steps: int,
        sampler: str,
        grid: str | None,
        *,
        eta: float | None = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        x_T: Tensor | None = None,  # noqa: N803
        callback: Callable[[int, Tensor, Tensor, Tensor], object] | None = None,
    ) -> Tensor:
        """What `sample` says, in the space that the network works in."""
        cond = dict(cond or {})
        uncond = cond.pop("uncond", None)
        if scale != 1 and uncond is None:
            raise UserError(f"scale {scale} needs a model trained with cond_dropout (or a text model): it has no null")
        if x0 is None and (mask is not None or strength != 1):
            raise UserError("mask and strength need x0, the picture to start from")
        path, randn = self.path, SeededNoise(seeds)
        times = self._times(grid, steps, strength)
        x = randn((len(seeds), self.channels, *size), device=self.betas.device) if x_T is None else x_T
        if strength != 1:
            x = path.add_noise(x0, x, times[0])
        project = None if mask is None else inpaint(path, x0, mask, randn)
        denoise = cfg(self.denoiser, cond, uncond, scale)
        denoise = clip(denoise) if self.clip_denoised else denoise
        knobs = self._knobs(sampler, eta)
        x = SAMPLERS[sampler](
            denoise, x, times, path=path, randn=randn, project=project, callback=callback, **knobs
        )
        return x if project is None else project(x, times[-1])

    def _times(self, grid: str | None, steps: int, strength: float) -> Tensor:
        try:
            times = make_grid(grid or self.path.default_grid, self.path, steps)
            return times if strength == 1 else slice_grid(times, strength)
        except ValueError as e:
            raise UserError(str(e)) from e

    def _knobs(self, sampler: str, eta: float | None) -> dict[str, float]:
        if sampler not in SAMPLERS:
            raise UserError(
                f"sampler: got {sampler!r}{suggest(sampler, SAMPLERS)}, expected one of {', '.join(SAMPLERS)}"
            )
        takes = inspect.signature(SAMPLERS[sampler].function).parameters
        if eta and "eta" not in takes:
            raise UserError(f"sampler {sampler} takes no eta")
        knobs = {"eta": eta} if eta is not None and "eta" in takes else {}
        return {**knobs, "v_posterior": self.v_posterior} if "v_posterior" in takes else knobs

    # --- conditions ---------------------------------------------------------------------------------------------------

    def get_cond(self, batch: Mapping[str, Any]) -> dict[str, Any] | None:
        """The condition of a batch: {y: labels int64 [B]}, in training with some replaced by the null class."""
        if self.cond_stage_key is None:
            return None
        return {"y": self._drop_labels(self._value(batch, self.cond_stage_key).long())}

    def _value(self, batch: Mapping[str, Any], key: str) -> Any:
        if key not in batch:
            raise UserError(f"the batch has no key {key!r}; the data set gives {sorted(batch)} (cond_stage_key)")
        return batch[key]

    def _drop_labels(self, labels: Tensor) -> Tensor:
        if not (self.training and self.cond_dropout):
            return labels
        return labels.masked_fill(torch.rand(labels.shape, device=labels.device) < self.cond_dropout, self.null_class)

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", or None if the model was trained without one."""
        return self.num_classes if self.cond_dropout and self.num_classes is not None else None

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> dict[str, Any] | None:
        """{y: labels, uncond: {y: null class}} for class-conditional models; classes default to seed mod number."""
        if self.cond_stage_key is None:
            return super().condition(seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
        labels = self._class_labels(seeds, classes, prompts or negative_prompt)
        if self.null_class is None:
            return {"y": labels}
        return {"y": labels, "uncond": {"y": torch.full_like(labels, self.null_class)}}

    def _class_labels(self, seeds: Sequence[int], classes: Sequence[int] | None, text: Any) -> Tensor:
        """Checked class numbers, int64 [len(seeds)]."""
        if text:
            raise UserError("the model was trained on classes: it takes no prompt, give a class")
        if self.num_classes is None:
            raise UserError(f"{type(self).__name__} does not know its number of classes: set model.params.num_classes")
        classes = [s % self.num_classes for s in seeds] if classes is None else list(classes)
        classes = classes * len(seeds) if len(classes) == 1 else classes
        if len(classes) != len(seeds):
            raise UserError(f"got {len(classes)} classes for {len(seeds)} pictures")
        wrong = [c for c in classes if not 0 <= c < self.num_classes]
        if wrong:
            raise UserError(f"class {wrong[0]} does not exist: the model knows 0 to {self.num_classes - 1}")
        return torch.tensor(classes, device=self.betas.device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Labels are checked while they are on the host: on a GPU a wrong one is an assertion in a kernel."""
        labels = batch.get(self.cond_stage_key) if isinstance(batch, Mapping) else None
        if self.num_classes is not None and isinstance(labels, Tensor) and labels.device.type == "cpu":
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"label {low if low < 0 else high} in batch[{self.cond_stage_key!r}], but the model has "
                    f"{self.num_classes} classes (0 to {self.num_classes - 1}): set model.params.num_classes"
                )
        return batch

    # --- training -----------------------------------------------------------------------------------------------------

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """l1 or l2, averaged or per element."""
        error = (pred - target).abs() if self.loss_type == "l1" else F.mse_loss(pred, target, reduction="none")
        return error.mean() if mean else error

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, cond: Condition | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at given timesteps; names as the official code logs them, "train/loss_simple" and so on."""
        return self._losses(x_start, t, noise, cond)

    def _losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None, cond: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = self._training_noise(x_start) if noise is None else noise
        out = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = noise if self.parameterization == "eps" else self.denoiser.target(x_start, noise, t)
        error = self.get_loss(out.float(), target, mean=False).flatten(1).mean(1)  # [B]
        split = "train" if self.training else "val"
        logs = {f"{split}/loss_simple": error.mean()}
        simple = error
        if self.loss_weight != "uniform":
            simple = simple * self.denoiser.weight(self.loss_weight, t, self.min_snr_gamma).to(error)
        if self.parameterization != "flow":
            logvar = self.logvar[t]
            simple = simple / logvar.exp() + logvar
        if self.learn_logvar:
            logs |= {f"{split}/loss_gamma": simple.mean(), "logvar": self.logvar.detach().mean()}
        loss = self.l_simple_weight * simple.mean()
        if self.parameterization != "flow":
            logs[f"{split}/loss_vlb"] = (self.lvlb_weights[t] * error).mean()
        if self.original_elbo_weight:
            loss = loss + self.original_elbo_weight * logs[f"{split}/loss_vlb"]
        logs[f"{split}/loss"] = loss
        return loss, logs

    def _training_noise(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn(*x.shape[:2], 1, 1, device=x.device, dtype=x.dtype)
        return noise

    def _draw_times(self, x: Tensor) -> Tensor:
        if self.parameterization == "flow":
            return torch.rand(len(x), device=x.device)
        return torch.randint(0, self.num_timesteps, (len(x),), device=x.device)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1, lines 2-5: pictures [B, C, H, W] -> loss at random timesteps."""
        return self.p_losses(x, self._draw_times(x), cond=cond)

    def shared_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch -> loss and scalars under their official names."""
        return self(self.get_input(batch, self.first_stage_key), self.get_cond(batch))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`shared_step` with names that have no split."""
        total, logs = self.shared_step(batch)
        return total, {name.rpartition("/")[2]: value for name, value in logs.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("global_step", float(self.global_step))
        if self.scheduler_config:
            self.log("lr_abs", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    # --- weights ------------------------------------------------------------------------------------------------------

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Loads a checkpoint; only_model: its network (`model.*`) alone."""
        if not (only_model or self.load_only_unet):
            super().init_from_ckpt(path, ignore_keys)
            return
        state = {k.removeprefix("model."): v for k, v in checkpoint.read_state(path).items()}
        network = {k: v for k, v in state.items() if k.startswith("diffusion_model.")}
        rank_zero_info(f"{path}: {checkpoint.load(self.model, network, source=path, allow=tuple(ignore_keys))}")
        self._restart_ema()

    def _restart_ema(self) -> None:
        if self.use_ema:
            self.init_ema(self.model, float(self.model_ema.decay))
