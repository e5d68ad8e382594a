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
