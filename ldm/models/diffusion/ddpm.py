"""Pixel-space diffusion: the recipe of "Denoising Diffusion Probabilistic Models" (Ho et al. 2020).

Algorithm 1 (training) is `forward` and `p_losses`. Algorithm 2 (sampling) is `p_sample_loop`, as the official code has
it; `sample(seeds=...)` runs any row of `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm import checkpoint
from ldm.diffusion.denoiser import LOSS_WEIGHTS
from ldm.models.diffusion.classes import ClassLabels
from ldm.models.diffusion.pictures import Recorder, class_pictures, noising, row
from ldm.models.diffusion.sampling import Callback, Condition
from ldm.models.diffusion.tables import TabledDiffusion, after_loading, ancestral, noise_like
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.models.framework import rank_zero_info
from ldm.util import UserError, suggest

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import LatentDiffusion, Layout2ImgDiffusion

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "Layout2ImgDiffusion"]  # the latter two: see __getattr__

Losses = tuple[Tensor, dict[str, Tensor]]
PARAMETERIZATIONS = ("eps", "x0", "v", "flow")


def __getattr__(name: str) -> Any:
    """The latent recipes under their official module name; imported late, since they are built on DDPM."""
    if name in ("LatentDiffusion", "Layout2ImgDiffusion"):
        from ldm.models.diffusion import latent_diffusion

        return getattr(latent_diffusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class DDPM(ClassLabels, TabledDiffusion):
    """Diffusion on pictures; the official constructor parameters come first, in their order.

    Args:
        unet_config: `{target, params}` of the network.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: the schedule, see
            `make_beta_schedule`; given_betas replaces it.
        loss_type: l2 or l1.
        load_only_unet: read only the network from `ckpt_path`.
        use_ema: keep averaged weights, with `ema_decay`.
        first_stage_key: where the batch keeps the pictures.
        image_size: height and width to sample, one number or two.
        log_every_t: which states the official loops return.
        clip_denoised: keep x0 in [-1, 1] while sampling.
        original_elbo_weight, l_simple_weight: loss = l_simple_weight * simple + original_elbo_weight * vlb.
        v_posterior: posterior variance (1 - v) beta~ + v beta.
        conditioning_key: see DiffusionWrapper; None becomes adm where there is a cond_stage_key.
        parameterization: what the network predicts: eps, x0, v, or flow (rectified flow, time in [0, 1]).
        use_positional_encodings: never worked in the official code; only False.
        learn_logvar, logvar_init: a learned weight for each timestep, simple = loss / exp(logvar_t) + logvar_t.
        cond_stage_key: where the batch keeps class labels; None = unconditional.
        num_classes: written into the network's config, with one more for the null class if there is cond_dropout;
            None = what the config says, the null class included.
        cond_dropout: chance to replace a label by the null class in training, which makes guidance possible.
        loss_weight: uniform, min_snr (with min_snr_gamma), or another row of LOSS_WEIGHTS.
        offset_noise: standard deviation of added noise that is constant over each channel (0.1 is usual).
        logit_normal_times: for flow, times from the logistic function of N(0, 1), which are rarely near 0 and 1 (Esser
            et al. 2024, eq. 19).
        zero_terminal_snr: rescale the betas so that x_T is pure noise (Lin et al. 2023); needs x0 or v.
        base: further parameters of BaseModel.

    Raises:
        UserError: parameters that do not go together.
    """

    # what files of different age have or lack; a missing average is started anew by `after_loading`
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
        logit_normal_times: bool = False,
        ema_decay: float = 0.9999,
        **base: Any,
    ) -> None:
        base |= {"monitor": monitor, "ckpt_path": ckpt_path, "ignore_keys": ignore_keys}
        super().__init__(scheduler_config=scheduler_config, **base)
        self.loss_type, self.parameterization, self.load_only_unet = loss_type, parameterization, load_only_unet
        self.first_stage_key, self.cond_stage_key, self.cond_dropout = first_stage_key, cond_stage_key, cond_dropout
        self.image_size, self.channels, self.log_every_t = image_size, channels, log_every_t
        self.clip_denoised, self.v_posterior = clip_denoised, v_posterior
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.loss_weight, self.min_snr_gamma, self.offset_noise = loss_weight, min_snr_gamma, offset_noise
        self.logit_normal_times = logit_normal_times
        self.zero_terminal_snr, self.learn_logvar, self.logvar_init = zero_terminal_snr, learn_logvar, logvar_init
        self._check_options(use_positional_encodings)
        self._build_network(unet_config, num_classes, conditioning_key)
        if use_ema:
            self.init_ema(self.model, ema_decay)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self._init_logvar(logvar_init)
        self.register_load_state_dict_post_hook(after_loading)
        self.load_ckpt_path()

    def _build_network(self, config: Mapping[str, Any], num_classes: int | None, conditioning_key: str | None) -> None:
        if self.cond_stage_key is not None and conditioning_key is None:
            conditioning_key = "adm"
        params = self.class_config(config.get("params") or {}, num_classes, "num_classes")
        self.model = DiffusionWrapper({**config, "params": params}, conditioning_key)

    def _init_logvar(self, value: float) -> None:
        logvar = torch.full((self.num_timesteps,), float(value))
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    def _check_options(self, use_positional_encodings: bool) -> None:
        for name, value, known in (
            ("parameterization", self.parameterization, PARAMETERIZATIONS),
            ("loss_type", self.loss_type, ("l1", "l2")),
            ("loss_weight", self.loss_weight, ("uniform", *LOSS_WEIGHTS)),
        ):
            if value not in known:
                raise UserError(
                    f"{name}: got {value!r}{suggest(str(value), known)}, expected one of {', '.join(known)}"
                )
        if use_positional_encodings:
            raise UserError("use_positional_encodings: true was never implemented (compute_latent_shifts is missing)")
        if self.zero_terminal_snr and self.parameterization not in ("x0", "v"):
            raise UserError(
                f"zero_terminal_snr needs parameterization x0 or v, got {self.parameterization}: "
                "where x_T is pure noise, the noise says nothing about the picture"
            )
        if self.parameterization == "flow" and (self.learn_logvar or self.original_elbo_weight):
            raise UserError(
                "parameterization flow has no timesteps: learn_logvar and original_elbo_weight do not apply"
            )
        if not 0 <= self.cond_dropout < 1:
            raise UserError(f"cond_dropout: got {self.cond_dropout}, expected a probability below 1")

    # --- Algorithm 1: training ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, cond: Condition | None = None) -> Losses:
        """Lines 2-5: pictures [B, C, H, W] -> their loss at random times, and what to log."""
        return self.p_losses(x, self.draw_times(x), cond=cond)

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, cond: Condition | None = None
    ) -> Losses:
        """The loss at given times, and scalars under their official names, `train/loss_simple` and so on."""
        return self.losses_at(x_start, t, noise, cond)

    def draw_times(self, x: Tensor) -> Tensor:
        """A time for each image [B]: table indices, or numbers in [0, 1) for flow."""
        if self.parameterization == "flow":
            normal = self.logit_normal_times
            return torch.randn(len(x), device=x.device).sigmoid() if normal else torch.rand(len(x), device=x.device)
        return torch.randint(0, self.num_timesteps, (len(x),), device=x.device)

    def training_noise(self, x: Tensor) -> Tensor:
        """Normal noise, with `offset_noise` constant over each channel added."""
        noise = torch.randn_like(x)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn(*x.shape[:2], 1, 1, device=x.device, dtype=x.dtype)
        return noise

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """l1 or l2, averaged or per element."""
        error = (pred - target).abs() if self.loss_type == "l1" else (pred - target) ** 2
        return error.mean() if mean else error

    def losses_at(self, x_start: Tensor, t: Tensor, noise: Tensor | None, cond: Any) -> Losses:
        """`p_losses` of both recipes."""
        noise = self.training_noise(x_start) if noise is None else noise
        out = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = noise if self.parameterization == "eps" else self.denoiser.target(x_start, noise, t)
        error = self.get_loss(out.float(), target, mean=False).flatten(1).mean(dim=1)  # [B]
        split = "train" if self.training else "val"
        logs = {f"{split}/loss_simple": error.mean()}
        simple = error
        if self.loss_weight != "uniform":
            simple = simple * self.denoiser.weight(self.loss_weight, t, self.min_snr_gamma).to(error)
        if self.learn_logvar or self.logvar_init:
            simple = simple / self.logvar[t].exp() + self.logvar[t]
        if self.learn_logvar:
            logs |= {f"{split}/loss_gamma": simple.mean(), "logvar": self.logvar.detach().mean()}
        loss = self.l_simple_weight * simple.mean()
        if self.parameterization != "flow":
            logs[f"{split}/loss_vlb"] = (self.lvlb_weights[t] * error).mean()
            if self.original_elbo_weight:
                loss = loss + self.original_elbo_weight * logs[f"{split}/loss_vlb"]
        logs[f"{split}/loss"] = loss
        return loss, logs

    def shared_step(self, batch: dict[str, Any]) -> Losses:
        """Batch -> loss and scalars under their official names."""
        return self(self.get_input(batch, self.first_stage_key), self.get_cond(batch))

    def loss(self, batch: dict[str, Any]) -> Losses:
        """`shared_step` with names that have no split."""
        total, logs = self.shared_step(batch)
        return total, {name.rpartition("/")[2]: value for name, value in logs.items()}

    def log_name(self, split: str, name: str) -> str:
        """The official names: `logvar` belongs to no split."""
        return name if name in ("logvar", "logvar_ema") else super().log_name(split, name)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("global_step", float(self.global_step))
        if self.scheduler_config:
            self.log("lr_abs", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    # --- Algorithm 2: the official sampling loop ----------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """The network's output for x_t [B, C, H, W], t [B]."""
        return self.model(x_noisy, self.network_time(t), **self.as_condition(cond))

    def network_time(self, t: Tensor) -> Tensor:
        """The network's time embedding was made for table indices."""
        return 1000 * t if self.parameterization == "flow" else t

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        repeat_noise: bool = False,
        cond: Condition | None = None,
    ) -> Tensor:
        """Lines 3-4; repeat_noise: one noise for the whole batch."""
        mean, _, log_variance = self.p_mean_variance(x, t, clip_denoised, cond)
        return ancestral(mean, log_variance, t, noise_like(x, repeat_noise))

    @torch.no_grad()
    def p_sample_loop(
        self, shape: Sequence[int], return_intermediates: bool = False, cond: Condition | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """T steps from x_T ~ N(0, I) of this shape; also every `log_every_t`-th state on request."""
        self.refuse_flow()
        x = torch.randn(tuple(shape), device=self.betas.device)
        states = [x]
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device)
            x = self.p_sample(x, t, clip_denoised=self.clip_denoised, cond=cond)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                states.append(x)
        return (x, states) if return_intermediates else x

    def refuse_flow(self) -> None:
        if self.parameterization == "flow":
            raise UserError("parameterization flow has no official sampling loop: call sample(seeds=[...])")

    # --- sampling by name and seed ------------------------------------------------------------------------------------

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
        callback: Callback | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Pictures [len(seeds), C, H, W] in [-1, 1], each from its own seed.

        Without seeds this is the official `sample(batch_size, return_intermediates)`: T steps, global generator.

        Args:
            cond: from `condition` or `get_cond`; its entry `uncond` is needed where scale is not 1.
            steps, sampler, grid: number of steps, a row of SAMPLERS, a row of GRIDS (None = the path's default).
            eta: share of fresh noise, for samplers that have it; None = the sampler's default.
            scale: of classifier-free guidance; 1 = none.
            height, width: of the pictures; None = image_size.
            mask, x0: [n, 1, H, W] (1 = keep) and the picture [n, C, H, W] to keep from.
            strength: below 1, start from x0 noised so far (image to image).
            callback: called after every step with (step, time, x_t, x0); a true result stops.

        Raises:
            UserError: unknown sampler or grid, or knobs that do not apply.
        """
        size = height or pair(self.image_size)[0], width or pair(self.image_size)[1]
        if seeds is None:
            n, cond = (cond, None) if isinstance(cond, int) else (batch_size, cond)
            return self.p_sample_loop((n, self.channels, *size), return_intermediates, cond)
        return self.generate(
            cond, seeds, size, steps, sampler, grid, eta, scale, mask, x0, strength, callback=callback
        ).clamp(-1, 1)

    # --- conditions and pictures --------------------------------------------------------------------------------------

    def get_cond(self, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The condition of a batch, {y: labels int64 [B]}; in training some are the null class."""
        if self.cond_stage_key is None:
            return None
        return {"y": self.drop_labels(self.value_of(batch, self.cond_stage_key).long())}

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> dict[str, Any] | None:
        """{y: labels, uncond: {y: null class}}, None for an unconditional model; classes default to the seeds'."""
        if self.cond_stage_key is None:
            return super().condition(seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
        labels = self.class_labels(seeds, classes, prompts or negative_prompt, self.betas.device)
        if self.null_class is None:
            return {"y": labels}
        return {"y": labels, "uncond": {"y": torch.full_like(labels, self.null_class)}}

    @torch.no_grad()
    def log_images(
        self,
        batch: dict[str, Any],
        n: int = 8,
        *,
        N: int | None = None,  # noqa: N803  (the official name of n)
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int = 20,
        ddim_eta: float = 0.0,
        return_keys: Sequence[str] | None = None,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """inputs; conditioning (classes); samples, one for each input's condition; and as one picture each the rows
        diffusion_row (noising) and denoise_row (sampling) of the first n_row images.

        n, N: number of images. return_keys: only these. split: the official callers say it; nothing depends on it.
        """
        n = N or n
        batch = {k: v[:n] for k, v in batch.items()}
        x = self.get_input(batch, self.first_stage_key)
        seeds, size = range(len(x)), x.shape[2:]
        pictures = {"inputs": x, "diffusion_row": row(noising(self.path, x), n_row).clamp(-1, 1)}
        cond = self.get_cond(batch)
        if cond is not None:
            pictures["conditioning"] = class_pictures(batch, self.cond_stage_key, self.class_names, (size[1], size[0]))
        if sample:
            record = Recorder(ddim_steps)
            with self.ema_scope("Plotting"):
                pictures["samples"] = self.sample(
                    cond, seeds=seeds, steps=ddim_steps, eta=ddim_eta, height=size[0], width=size[1], callback=record
                )
            pictures["denoise_row"] = row(record.states, n_row).clamp(-1, 1)
        return {k: v for k, v in pictures.items() if return_keys is None or k in return_keys}

    # --- weights ------------------------------------------------------------------------------------------------------

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Loads a checkpoint; only_model (or load_only_unet): just its network, `model.*`."""
        if not (only_model or self.load_only_unet):
            super().init_from_ckpt(path, ignore_keys)
            return
        state = {k.removeprefix("model."): v for k, v in checkpoint.read_state(path).items()}
        network = {k: v for k, v in state.items() if k.startswith("diffusion_model.")}
        rank_zero_info(f"{path}: {checkpoint.load(self.model, network, source=path, allow=tuple(ignore_keys))}")
        self.restart_ema()
