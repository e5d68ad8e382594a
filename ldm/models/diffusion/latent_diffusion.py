"""Latent diffusion (Rombach et al. 2022): DDPM on the latents of a frozen first stage, with any condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.official import DDIMSampler
from ldm.models.autoencoder import VQModel
from ldm.models.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ldm.models.diffusion.ddpm import DDPM, Losses, pair
from ldm.models.diffusion.first_stage import LATENTS
from ldm.models.diffusion.general import texts_of
from ldm.models.diffusion.loops import LatentLoops, first_rows
from ldm.models.diffusion.pictures import Recorder, box_masks, class_pictures, noising, row, to_rgb
from ldm.models.diffusion.sampling import Callback
from ldm.modules.conditioners import GeneralConditioner
from ldm.util import UserError, isimage, ismap, log_txt_as_img


class LatentDiffusion(Conditioning, LatentLoops, DDPM):
    """Diffusion on latents; the official constructor parameters come first, in their order.

    Args:
        first_stage_config: `{target, params}` of the autoencoder, or a run directory or checkpoint of this project.
        cond_stage_config: `{target, params}` of the conditioner, `__is_first_stage__` or `__is_unconditional__`.
        num_timesteps_cond: above 1, the condition is noised too, at times of a schedule of so many steps.
        cond_stage_key: where the batch keeps the condition: class_label, caption, a map, ...
        cond_stage_trainable: train the conditioner with the network.
        concat_mode: decides conditioning_key where that is None: concat or crossattn.
        cond_stage_forward: method of the conditioner to call; None = `encode`, or calling it.
        conditioning_key: where the condition enters the network, see DiffusionWrapper.
        scale_factor: latents are multiplied by it; auto = measured over at least 1,000 training images.
        scale_by_std: the official rule: measured on the first batch.
        concat_keys: maps of the batch that go to the network's input channels in this order, beside the condition
            (hybrid) or after it (concat): masks are resized, `masked_image_key` is encoded.
        widen_input: input channels that a checkpoint lacks start at zero, so that a model without concat_keys can be
            trained on into one with them.
        cache_latents: folder where the latents of the training and validation pictures (and of their mirror images,
            with flip_p) are kept: encoded once, before the first step. Refused with other augmentations.
        num_classes, cond_dropout: as for DDPM; the null class is one row more in the class embedder, the null text
            is empty.
        ddpm: unet_config and every other parameter of DDPM; `clip_denoised` is always false.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any] | str,
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float | str = 1.0,
        scale_by_std: bool = False,
        *,
        concat_keys: Sequence[str] = (),
        masked_image_key: str = "masked_image",
        num_classes: int | None = None,
        widen_input: bool = False,
        cache_latents: str | None = None,
        **ddpm: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        weights, ignored = ddpm.pop("ckpt_path", None), ddpm.pop("ignore_keys", ())
        ddpm |= {
            "conditioning_key": conditioning_key,
            "num_classes": num_classes if conditioning_key == "adm" else None,
        }
        super().__init__(**ddpm)
        self.clip_denoised = False  # latents are not bounded
        self.concat_mode, self.cond_stage_key = concat_mode, cond_stage_key
        self.cond_stage_trainable, self.cond_stage_forward = cond_stage_trainable, cond_stage_forward
        self.concat_keys, self.masked_image_key = tuple(concat_keys), masked_image_key
        self.cache_latents, self.widen_input = cache_latents, widen_input
        self._check_condition()
        self._init_cond_schedule(num_timesteps_cond or 1)
        self.init_first_stage(first_stage_config, scale_factor, scale_by_std)
        self.init_cond_stage(cond_stage_config, num_classes)
        if weights is not None:
            self.init_from_ckpt(weights, ignored)

    def _check_condition(self) -> None:
        key = self.conditioning_key
        if self.concat_keys and key not in ("concat", "hybrid"):
            raise UserError(f"concat_keys need conditioning_key concat or hybrid, got {key}")
        if key == "hybrid" and not self.concat_keys:
            raise UserError("conditioning_key hybrid needs concat_keys, the maps of the batch to concatenate")
        if self.cond_dropout and key in (None, "concat"):
            raise UserError(f"cond_dropout does not apply to conditioning_key {key}: there is no null condition")

    def check_latents(self, shape: Sequence[int], fixed_size: bool = False) -> None:
        super().check_latents(shape, fixed_size)
        height, width = shape[1:]
        if fixed_size and (height, width) != pair(self.image_size):
            size = height if height == width else [height, width]
            raise UserError(
                f"the first stage makes latents of {height} x {width} of the training pictures, but image_size says "
                f"{self.image_size}: set model.params.image_size={size} (or auto), or another data.params.size"
            )

    def check_cacheable(self) -> None:
        if self.conditioning_key is not None and (self.concat_keys or self.cond_stage_key == self.first_stage_key):
            raise UserError("cache_latents: this model's condition is made of the pictures, which are then not read")

    def _init_cond_schedule(self, steps: int) -> None:
        """cond_ids [T]: the time at which a condition is noised that goes with x_t; all but the first are T - 1."""
        if steps > self.num_timesteps:
            raise UserError(f"num_timesteps_cond: got {steps}, expected at most timesteps ({self.num_timesteps})")
        self.num_timesteps_cond, self.shorten_cond_schedule = steps, steps > 1
        ids = torch.full((self.num_timesteps,), self.num_timesteps - 1)
        ids[:steps] = torch.linspace(0, self.num_timesteps - 1, steps).round().long()
        self.register_buffer("cond_ids", ids, persistent=False)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen stages stay in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def configure_model(self) -> None:
        super().configure_model()
        self.first_stage_model.to(memory_format=torch.channels_last)

    # --- batch --------------------------------------------------------------------------------------------------------

    def get_input(
        self,
        batch: dict[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
    ) -> list[Any]:
        """[latents, condition], and on request pictures and reconstructions, and the input of the conditioner.

        A trainable conditioner runs in `forward`: until then the condition is its input, unless force_c_encode.
        bs: only so many images. All maps are [B, C, H, W]. With `cache_latents`, the reconstructions stand for the
        pictures.
        """
        batch = batch if bs is None else {key: v[:bs] for key, v in batch.items()}
        x = None if LATENTS in batch else super().get_input(batch, k)
        z = self.latents_of(batch).detach()
        self.check_latents(z.shape[1:])
        c = xc = None
        if self.conditioning_key is not None:
            c = xc = self.condition_input(batch, x, cond_key or self.cond_stage_key)
            maps = self.concat_maps(batch, z.shape[2:])
            if force_c_encode or not self.cond_stage_trainable:
                c = self.with_maps(self.get_learned_conditioning(xc), maps)
            elif maps:
                c = {"input": xc, "maps": maps}
        out = [z, c]
        if return_first_stage_outputs:
            reconstruction = self.decode_first_stage(z)
            out += [reconstruction if x is None else x, reconstruction]
        return [*out, xc] if return_original_cond else out

    # --- training -----------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict[str, Any]) -> Losses:
        """Batch -> loss and scalars under their official names."""
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def forward(self, x: Tensor, c: Any = None) -> Losses:
        """Latents and the condition from `get_input` -> their loss at random times, and what to log."""
        t = self.draw_times(x)
        if self.conditioning_key is not None:
            if self.cond_stage_trainable:
                xc, maps = (c["input"], c["maps"]) if self.concat_keys else (c, [])
                c = self.with_maps(self.get_learned_conditioning(xc), maps)
            if self.shorten_cond_schedule:
                c = self.q_sample(c, self.cond_ids[t], torch.randn_like(c.float()))
        return self.p_losses(x, c, t)

    def p_losses(self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None) -> Losses:
        """The loss at given times, and scalars under their official names, `train/loss_simple` and so on."""
        return self.losses_at(x_start, t, noise, cond)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None, return_ids: bool = False) -> Any:
        """The network's output for x_t [B, C, h, w], t [B]; cond in any official form.

        return_ids: all outputs of a network that has several, instead of the first.
        """
        out = self.model(x_noisy, self.network_time(t), **self.as_condition(cond))
        return out[0] if isinstance(out, tuple) and not return_ids else out

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Any = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,  # noqa: N803
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 50,
        sampler: str = "ddim",
        grid: str | None = None,
        eta: float | None = None,
        scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Pictures [len(seeds), 3, H, W] in [-1, 1], each from its own seed.

        The knobs are those of `DDPM.sample`; mask and x0 are of latents. Without seeds this is the official call:
        latents [batch_size, C, h, w] by `p_sample_loop`, global generator.
        """
        if seeds is None:
            shape = shape or (batch_size, self.channels, *pair(self.image_size))
            return self.p_sample_loop(
                first_rows(cond, batch_size), shape, return_intermediates, x_T, verbose,
                timesteps=timesteps, quantize_denoised=quantize_denoised, mask=mask, x0=x0,
            )  # fmt: skip
        z = self.generate(
            cond, seeds, self.latent_size(height, width, cond), steps, sampler, grid, eta, scale, mask, x0, strength,
            noise=x_T, edit=self.quantize if quantize_denoised else None, callback=callback,
        )  # fmt: skip
        return self.decode_first_stage(z).clamp(-1, 1)

    def latent_size(self, height: int | None, width: int | None, cond: Any = None) -> tuple[int, int]:
        """Height and width of the latents of such pictures; None = those of the condition's map, or image_size."""
        f, maps = self.downsampling, self.as_condition(cond).get("c_concat")
        size = pair(self.image_size) if maps is None else tuple(maps.shape[2:])
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels % f:
                raise UserError(f"{name}: got {pixels}, expected a multiple of {f}")
        return (height // f if height else size[0], width // f if width else size[1])

    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **options: Any) -> tuple[Tensor, Any]:
        """The official (latents, intermediates), by DDIM on its `uniform` grid or by all T steps.

        options: those of `DDIMSampler.sample`, or of `sample` without ddim.
        """
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **options)
        shape = (self.channels, *pair(self.image_size))
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **options)

    # --- pictures -----------------------------------------------------------------------------------------------------

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
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """inputs, reconstruction, conditioning (original_conditioning for a map that is no picture), and

        samples: of the inputs' conditions, and the same sampling as denoise_row (states) and progressive_row
        (predictions of x0); samples_x0_quantized: with x0 snapped to the codebook at every step;
        samples_inpainting: the middle of the inputs made anew, where `mask` is black; samples_outpainting: all but the
        middle; diffusion_row: noising. Rows show the first n_row images in one picture.

        n, N: number of images. return_keys: only these. split: the official callers say it; nothing depends on it.
        """
        z, c, x, xrec, xc = self.get_input(
            batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True,
            return_original_cond=True, bs=N or n,
        )  # fmt: skip
        pictures = {"inputs": x, "reconstruction": xrec.clamp(-1, 1)} | self._condition_pictures(batch, c, x, xc)
        if plot_diffusion_rows:
            pictures["diffusion_row"] = self._row(noising(self.path, z[:n_row]), n_row)
        knobs = {"seeds": range(len(z)), "steps": ddim_steps, "eta": ddim_eta, "sampler": "ddim"}
        knobs |= {"height": x.shape[2], "width": x.shape[3]}
        with self.ema_scope("Plotting"):
            if sample:
                record = Recorder(ddim_steps)
                pictures["samples"] = self.sample(c, **knobs, callback=record)
                if plot_denoise_rows:
                    pictures["denoise_row"] = self._row(record.states, n_row)
                if plot_progressive_rows:
                    pictures["progressive_row"] = self._row(record.predictions, n_row)
            if sample and quantize_denoised and isinstance(self.first_stage_model, VQModel):
                pictures["samples_x0_quantized"] = self.sample(c, quantize_denoised=True, **knobs)
            if sample and inpaint:
                mask = box_masks(z)
                pictures["mask"] = 2 * mask - 1
                pictures["samples_inpainting"] = self.sample(c, mask=mask, x0=z, **knobs)
                pictures["samples_outpainting"] = self.sample(c, mask=1 - mask, x0=z, **knobs)
        return {k: v for k, v in pictures.items() if return_keys is None or k in return_keys}

    def _row(self, latents: Sequence[Tensor], n_row: int) -> Tensor:
        return row([self.decode_first_stage(z[:n_row]) for z in latents], n_row).clamp(-1, 1)

    def _condition_pictures(self, batch: dict[str, Any], c: Any, x: Tensor, xc: Any) -> dict[str, Tensor]:
        """`conditioning` as a picture, whatever kind of condition it is."""
        size, key = (x.shape[3], x.shape[2]), self.cond_stage_key
        if self.conditioning_key is None:
            return {}
        if isinstance(self.cond_stage_model, GeneralConditioner):
            xc = xc.get(next(iter(texts_of(self.cond_stage_model)), None))
        if isinstance(xc, (list, tuple)):
            return {"conditioning": log_txt_as_img(size, xc)}
        if key == "class_label":
            return {"conditioning": class_pictures(batch, key, self.class_names, size)[: len(x)]}
        pictures = {"original_conditioning": to_rgb(xc)} if ismap(xc) else {}
        if callable(getattr(self.cond_stage_model, "decode", None)) and isinstance(c, Tensor) and c.ndim == 4:
            latents = c[:, : self.channels]  # maps of concat_keys follow
            pictures["conditioning"] = self.cond_stage_model.decode(latents).clamp(-1, 1)
        elif isimage(xc):
            pictures["conditioning"] = xc
        return pictures


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion on bounding boxes, given as tokens under `coordinates_bbox`."""

    def __init__(
        self,
        first_stage_config: Mapping[str, Any] | str,
        cond_stage_config: Mapping[str, Any] | str,
        cond_stage_key: str = "coordinates_bbox",
        **latent: Any,
    ) -> None:
        if cond_stage_key != "coordinates_bbox":
            raise UserError(f"Layout2ImgDiffusion: got cond_stage_key {cond_stage_key!r}, expected 'coordinates_bbox'")
        super().__init__(first_stage_config, cond_stage_config, cond_stage_key=cond_stage_key, **latent)

    def log_images(self, batch: dict[str, Any], n: int = 8, **options: Any) -> dict[str, Tensor]:
        """Those of LatentDiffusion, and bbox_image: the boxes with their labels, drawn by the data set.

        As in taming, the data set has `conditional_builders[cond_stage_key].plot(tokens, label_of_class, (W, H))`,
        `get_category_id` and `get_textual_label`.
        """
        pictures = super().log_images(batch, n, **options)
        data = self._data_set("train" if self.training else "validation")
        if data is not None:
            builder, size = data.conditional_builders[self.cond_stage_key], pictures["inputs"].shape[:1:-1]
            tokens = batch[self.cond_stage_key][: len(pictures["inputs"])].cpu()

            def label_of(number: int) -> str:
                return data.get_textual_label(data.get_category_id(number))

            pictures["bbox_image"] = torch.stack([builder.plot(t, label_of, tuple(size)) for t in tokens])
        return pictures

    def _data_set(self, split: str) -> Any:
        """The data set of a split, if a Trainer is there and the data set can draw its conditions."""
        datamodule = self._trainer.datamodule if self._trainer is not None else None
        found = getattr(datamodule, "datasets", {}).get(split)
        return found if hasattr(found, "conditional_builders") else None
