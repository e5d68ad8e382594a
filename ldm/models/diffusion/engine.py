"""generative-models' recipe (Stability AI, MIT licence) by its names and parameters: SD 2, SDXL, and its own trainings.

Its YAML files say a network, a denoiser, a conditioner, a sampler and a loss where LatentDiffusion has one recipe.
Steps and grids are ours: x0 = denoiser(network, x_t / alpha_t, sigma_t / alpha_t, condition) on any path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.schedule import Path, VEPath, VPPath, expand, slice_grid
from ldm.diffusion.sgm import BaseDiffusionSampler, Discretization, OpenAIWrapper
from ldm.models.base import BaseModel, Config
from ldm.models.diffusion.first_stage import LATENTS, FirstStage
from ldm.models.diffusion.general import (
    GeneralConditions,
    check_inputs,
    input_keys,
    labels_of,
    named,
    reads_size,
    size_numbers,
    with_sizes,
)
from ldm.models.diffusion.sampling import Callback, SeededSampling
from ldm.modules.conditioners import CONDITION_NAMES
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, isimage, log_txt_as_img

NO_CONDITION = {"target": "ldm.modules.conditioners.GeneralConditioner", "params": {"emb_models": []}}
SGM_NAMES = {ours: theirs for theirs, ours in CONDITION_NAMES.items()}


class DiffusionEngine(GeneralConditions, FirstStage, SeededSampling):
    """A diffusion model put together from generative-models' parts; its parameters come first, in their order.

    Args:
        network_config: `{target, params}` of the network.
        denoiser_config: what the network predicts and which noise levels it knows.
        first_stage_config: as for LatentDiffusion.
        conditioner_config: a GeneralConditioner; None = unconditional.
        sampler_config: default sampler, noise levels, steps and guidance scale of `sample`.
        optimizer_config, scheduler_config: as for every recipe.
        loss_fn_config: the loss; needed for training only.
        network_wrapper: target that feeds the condition to the network; None = OpenAIWrapper.
        ckpt_path: weights to start from.
        use_ema, ema_decay_rate: average the network's weights.
        scale_factor: latents are multiplied by it; auto = measured over at least 1,000 training images.
        disable_first_stage_autocast: run the first stage in the precision of its weights.
        input_key: where the batch keeps the pictures.
        log_keys, no_cond_log: which inputs of the conditioner `log_images` shows (None = all); none of them.
        compile_model: compile the network.
        en_and_decode_n_samples_a_time: run the first stage on so many pictures at once; None = on all.
        image_size: pixels to sample, one number or [height, width]; None = those of the training pictures, and what
            the released models were trained on (512, SDXL 1024) where nothing was trained.
        cache_latents: folder where the latents of the data are kept, as for LatentDiffusion.
        base: further parameters of BaseModel.
    """

    tolerated_keys: tuple[str, ...] = ("model_ema.", "scale_factor", "loss_fn.", "first_stage_model.loss.")
    clip_denoised, v_posterior = False, 0.0

    def __init__(
        self,
        network_config: Config,
        denoiser_config: Config,
        first_stage_config: Config | str,
        conditioner_config: Config | None = None,
        sampler_config: Config | None = None,
        optimizer_config: Config | None = None,
        scheduler_config: Config | None = None,
        loss_fn_config: Config | None = None,
        network_wrapper: str | None = None,
        ckpt_path: str | None = None,
        use_ema: bool = False,
        ema_decay_rate: float = 0.9999,
        scale_factor: float | str = 1.0,
        disable_first_stage_autocast: bool = False,
        input_key: str = "jpg",
        log_keys: Sequence[str] | None = None,
        no_cond_log: bool = False,
        compile_model: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        cache_latents: str | None = None,
        **base: Any,
    ) -> None:
        base |= {"optimizer_config": optimizer_config, "scheduler_config": scheduler_config, "ckpt_path": ckpt_path}
        super().__init__(**base)
        self.first_stage_key, self.log_keys, self.no_cond_log = input_key, log_keys, no_cond_log
        self.disable_first_stage_autocast, self.chunk = disable_first_stage_autocast, en_and_decode_n_samples_a_time
        self.image_size = [image_size] * 2 if isinstance(image_size, int) else image_size
        self.cache_latents = cache_latents
        network = instantiate_from_config(network_config)
        self.channels: int = network.out_channels
        wrapper = OpenAIWrapper if network_wrapper is None else get_obj_from_str(network_wrapper)
        self.model = wrapper(network, compile_model=compile_model)
        self.denoiser = instantiate_from_config(denoiser_config)
        self.sampler: BaseDiffusionSampler | None = None
        if sampler_config is not None:
            self.sampler = instantiate_from_config(sampler_config)
        self.conditioner = instantiate_from_config(conditioner_config or NO_CONDITION)
        self.loss_fn = None if loss_fn_config is None else instantiate_from_config(loss_fn_config)
        self._init_classes()
        self.init_first_stage(first_stage_config, scale_factor, scale_by_std=False)
        if use_ema:
            self.init_ema(self.model, ema_decay_rate)
        self._path: Path | None = None
        self.register_load_state_dict_post_hook(_after_loading)
        self.load_ckpt_path()

    def _init_classes(self) -> None:
        labels = labels_of(self.conditioner)
        self.cond_stage_key, self.num_classes = labels or (None, None)
        self.cond_dropout = 0.0  # the conditioner has ucg_rate instead

    def train(self, mode: bool = True) -> DiffusionEngine:
        """The first stage stays in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        return self

    def configure_model(self) -> None:
        super().configure_model()
        self.first_stage_model.to(memory_format=torch.channels_last)

    def exact_modules(self) -> list[torch.nn.Module]:
        return [self, *self.denoiser.modules()]

    # --- batch and first stage ----------------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any], key: str | None = None) -> Tensor:
        """Pictures [B, C, H, W]. generative-models' data sets give them in that order, this project's have C last."""
        key = key or self.first_stage_key
        x = batch.get(key)
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] > 4 >= x.shape[1]:
            batch = {**batch, key: x.permute(0, 2, 3, 1)}
        return super().get_input(batch, key)

    def first_stage_scope(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast around the first stage, off with `disable_first_stage_autocast`."""
        enabled = torch.is_autocast_enabled(device.type) and not self.disable_first_stage_autocast
        return torch.autocast(device.type, enabled=enabled)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] -> scaled latents [B, c, h, w]."""
        with self.first_stage_scope(x.device):
            parts = [self.get_first_stage_encoding(self.posterior(part)) for part in x.split(self.chunk or len(x))]
        return torch.cat(parts)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents [B, c, h, w] -> pictures [B, C, H, W]."""
        with self.first_stage_scope(z.device):
            parts = [self.differentiable_decode_first_stage(part) for part in z.split(self.chunk or len(z))]
        return torch.cat(parts)

    def pictures_of(self, batch: Mapping[str, Any]) -> Tensor:
        return self.get_input(batch)

    def latents_of(self, batch: Mapping[str, Any]) -> Tensor:
        return super().latents_of(batch) if LATENTS in batch else self.encode_first_stage(self.get_input(batch))

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and their batch -> loss, and what to log."""
        if self.loss_fn is None:
            raise UserError("model.params.loss_fn_config is missing: this config is for sampling only")
        check_inputs(self.conditioner, batch)
        loss = self.loss_fn(self.model, self.denoiser, self.conditioner, x, batch).mean()
        return loss, {"loss": loss}

    def shared_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch -> loss, and what to log."""
        z = self.latents_of(batch)
        size = [self.downsampling * n for n in z.shape[2:]]
        self.image_size = self.image_size or size
        return self(z, with_sizes(self.conditioner, batch, size, z.device))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same."""
        return self.shared_step(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["image_size"] = self.image_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.image_size = self.image_size or checkpoint.get("image_size")

    # --- sampling -----------------------------------------------------------------------------------------------------

    @property
    def discretization(self) -> Discretization | None:
        """The noise levels of the sampler, else of the denoiser."""
        return getattr(self.denoiser, "discretization", None) if self.sampler is None else self.sampler.discretization

    @property
    def path(self) -> Path:
        """That of DDPM where the noise levels are a DDPM's, else variance exploding."""
        if self._path is None:
            levels = self.discretization
            abar = getattr(levels, "alphas_cumprod", None)
            if abar is not None:
                self._path = VPPath(abar)
            else:
                known = {k: getattr(levels, k) for k in ("sigma_min", "sigma_max") if hasattr(levels, k)}
                self._path = VEPath(**known)
        return self._path

    def denoise(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x_t [B, C, h, w] and the time -> x0, by the config's denoiser, whose states have alpha = 1."""
        t = t if t.ndim == 0 else t.to(x.device)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        level = (sigma / alpha).to(x.device, torch.float32).expand(len(x))
        return self.denoiser(self.model, x / expand(alpha, x.ndim), level, sgm_names(cond))

    def first_state(self, noise: Tensor, t: Tensor) -> Tensor:
        """Noise with the variance of data of unit variance at time t."""
        return noise * (self.path.alpha(t) ** 2 + self.path.sigma(t) ** 2).sqrt()

    def times(self, steps: int, grid: str | None, strength: float = 1.0) -> Tensor:
        """The config's own noise levels, or a row of GRIDS."""
        if grid is not None or self.discretization is None:
            return super().times(steps, grid, strength)
        try:
            times = self.path.time(-self.discretization.get_sigmas(steps).cpu().double().log())
            times = times if self.path.timesteps is None else times.round()
            return slice_grid(F.pad(times, (0, 1), value=self.path.t_clean), strength)
        except ValueError as e:
            raise UserError(str(e)) from e

    def _knobs(self, sampler: str, eta: float | None) -> dict[str, float]:
        own = self.sampler is not None and sampler == self.sampler.name
        return {**(self.sampler.knobs if own else {}), **super()._knobs(sampler, eta)}

    def as_condition(self, cond: Any) -> dict[str, Any]:
        """A condition under this project's names, whichever names it has."""
        return named(super().as_condition(cond))

    @torch.no_grad()
    def sample(
        self,
        cond: Mapping[str, Any] | None = None,
        uc: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        shape: Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        grid: str | None = None,
        eta: float | None = None,
        scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pictures [len(seeds), C, H, W] in [-1, 1], each from its own seed.

        The knobs are those of LatentDiffusion; None = what `sampler_config` says (else 50 steps of euler; guidance
        where the condition has an `uncond`). mask and x0 are of latents. Without seeds this is the official call:
        latents [batch_size, *shape] by the config's sampler, global generator.
        """
        if seeds is None:
            return self._official_sample(cond, uc, batch_size, shape)
        name = sampler or (self.sampler.name if self.sampler is not None else "euler")
        steps = steps or (self.sampler.num_steps if self.sampler is not None else None) or 50
        if scale is None:
            guided = isinstance(cond, Mapping) and "uncond" in cond
            scale = getattr(getattr(self.sampler, "guider", None), "scale", 1.0) if guided else 1.0
        f, (h, w) = self.downsampling, self.pixels(height, width)
        if h % f or w % f:
            raise UserError(f"height and width: got {h} and {w}, expected multiples of {f}")
        z = self.generate(
            cond, seeds, (h // f, w // f), steps, name, grid, eta, scale, mask, x0, strength, callback=callback
        )
        return self.decode_first_stage(z).clamp(-1, 1)

    def _official_sample(
        self, cond: Mapping[str, Any] | None, uc: Mapping[str, Any] | None, batch_size: int, shape: Sequence[int] | None
    ) -> Tensor:
        if self.sampler is None:
            raise UserError("model.params.sampler_config is missing: give it, or call sample(cond, seeds=[...])")
        h, w = self.pixels(None, None)
        shape = shape or (self.channels, h // self.downsampling, w // self.downsampling)
        noise = torch.randn(batch_size, *shape).to(self.place)
        cond = sgm_names(cond)
        uc = cond if uc is None else sgm_names(uc)
        return self.sampler(lambda x, sigma, c: self.denoiser(self.model, x, sigma, c), noise, cond, uc)

    def pixels(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the pictures."""
        h, w = self.image_size or [self._released_size()] * 2
        if None in (height or h, width or w):
            raise UserError("which size? give height and width, or set model.params.image_size")
        return height or h, width or w

    def _released_size(self) -> int | None:
        """What SD 2 and SDXL were trained on, told by the first stage and the sizes that the conditioner reads."""
        if self.downsampling != 8:
            return None
        return 1024 if any("size_as_tuple" in k for k in input_keys(self.conditioner)) else 512

    # --- conditions and pictures --------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_cond(self, batch: Mapping[str, Any]) -> dict[str, Any] | None:
        """The condition of a batch in the form that `sample` takes; its `uncond` has every embedding zero."""
        keys = input_keys(self.conditioner)
        if not keys:
            return None
        size = self.get_input(batch).shape[2:] if self.first_stage_key in batch else self.pixels(None, None)
        batch = with_sizes(self.conditioner, batch, size, self.place)
        check_inputs(self.conditioner, batch)
        cond, uncond = self.conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=keys)
        return {**named(cond), "uncond": named(uncond)}

    @torch.no_grad()
    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        clip_skip: int = 1,
        long_prompt: bool = False,
        weights: bool = True,
        height: int | None = None,
        width: int | None = None,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float = 2.5,
    ) -> dict[str, Any] | None:
        """The condition of each seed, with its absence as `uncond`; the arguments are those of LatentDiffusion."""
        if not input_keys(self.conditioner):
            return BaseModel.condition(self, seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
        size = self.pixels(height, width) if reads_size(self.conditioner) else (0, 0)
        return self.general_condition(
            self.conditioner, seeds, classes, prompts, negative_prompt,
            size_numbers(self.conditioner, size, original_size, crop, target_size, aesthetic_score),
            negative_aesthetic_score, clip_skip=clip_skip, long_prompt=long_prompt, weights=weights,
        )  # fmt: skip

    @torch.no_grad()
    def log_images(
        self,
        batch: dict[str, Any],
        n: int = 8,
        *,
        N: int | None = None,  # noqa: N803  (the official name of n)
        n_rows: int = 4,
        sample: bool = True,
        ucg_keys: Sequence[str] | None = None,
        use_ema_scope: bool = True,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """inputs, reconstructions, what the conditioner reads (each under its key), and samples of these conditions.

        n, N: number of images. ucg_keys: inputs of the conditioner that are zero in the unconditional half (None =
        all). use_ema_scope: sample with averaged weights. n_rows, split: official callers give them; nothing depends
        on them.
        """
        batch = {k: v[: N or n] for k, v in batch.items()}
        z = self.latents_of(batch)
        reconstructions = self.decode_first_stage(z).clamp(-1, 1)
        x = reconstructions if LATENTS in batch else self.get_input(batch)
        pictures = {"inputs": x, "reconstructions": reconstructions}
        batch = with_sizes(self.conditioner, batch, x.shape[2:], x.device)
        pictures |= self._condition_pictures(batch, (x.shape[3], x.shape[2]))
        if sample:
            keys = input_keys(self.conditioner) if ucg_keys is None else ucg_keys
            cond, uncond = self.conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=keys)
            with self.ema_scope("Plotting") if use_ema_scope else nullcontext():
                pictures["samples"] = self.sample(
                    {**cond, "uncond": uncond} if cond else None,
                    seeds=range(len(x)),
                    height=x.shape[2],
                    width=x.shape[3],
                )
        return pictures

    def _condition_pictures(self, batch: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        """What the conditioner reads, as text on pictures; size = (W, H)."""
        pictures: dict[str, Tensor] = {}
        for key in [] if self.no_cond_log else input_keys(self.conditioner):
            if self.log_keys is not None and key not in self.log_keys:
                continue
            value = batch[key]
            if isimage(value):
                pictures[key] = value
            elif not isinstance(value, Tensor) or value.ndim <= 2:
                lines = value if isinstance(value, (list, tuple)) else value.tolist()
                pictures[key] = log_txt_as_img(size, [str(line) for line in lines])
        return pictures


def sgm_names(cond: Mapping[str, Any] | None) -> dict[str, Any]:
    """A condition under the names of generative-models: crossattn, vector, concat."""
    return {SGM_NAMES.get(k, k): v for k, v in (cond or {}).items() if k != "uncond"}


def _after_loading(module: DiffusionEngine, incompatible: Any) -> None:
    """Averages start at the loaded weights where the file has none; noise levels keep their precision."""
    if module.use_ema and any(k.startswith("model_ema.") for k in incompatible.missing_keys):
        module.init_ema(module.model, float(module.model_ema.decay))
    sigmas = getattr(module.denoiser, "sigmas", None)
    if (
        sigmas is not None and sigmas.dtype != torch.float32 and not sigmas.is_meta
    ):  # a file in half precision, assigned
        module.denoiser.sigmas = sigmas.float()
