"""Conditions of latent diffusion: from a batch, from classes or prompts, and their absence for guidance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.families import for_recipe
from ldm.models.base import BaseModel
from ldm.models.diffusion import general
from ldm.models.diffusion.first_stage import LATENTS, FirstStage
from ldm.models.diffusion.general import GeneralConditions, one_each
from ldm.models.diffusion.wrapper import joined
from ldm.models.framework import rank_zero_info
from ldm.modules.conditioners import ClassEmbedder, GeneralConditioner
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.modules.prompts import TextEmbedder
from ldm.util import UserError, instantiate_from_config

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
# the convolution that sees the latents and the maps beside them, and its average
FIRST_WEIGHTS = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")
IMAGENET_AND_NULL = 1001  # rows of the class table of cin256-v2, the last one null


class Conditioning(GeneralConditions, FirstStage):
    """A latent recipe with a `cond_stage_model`. Subclasses call `init_cond_stage` when the first stage is there."""

    model: nn.Module
    cond_stage_model: nn.Module | None
    cond_stage_trainable: bool
    cond_stage_forward: str | None  # method of the conditioner to call; None = encode or forward
    image_size: int | Sequence[int]
    shorten_cond_schedule: bool
    concat_keys: Sequence[str]  # maps of the batch that go to the input's channels, in this order
    widen_input: bool  # input channels that a checkpoint lacks start at zero
    masked_image_key: str  # the one of them that is a picture and is encoded; the others are resized

    def init_cond_stage(self, config: Mapping[str, Any] | str, num_classes: int | None) -> None:
        """Builds the conditioner; config may be `__is_first_stage__` or `__is_unconditional__`."""
        if self.cond_stage_trainable and config in (FIRST_STAGE, UNCONDITIONAL):
            raise UserError(f"cond_stage_config {config} cannot be trained: set cond_stage_trainable to false")
        if config == UNCONDITIONAL:
            self.cond_stage_model = None
        elif config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        else:
            if num_classes is not None and self.conditioning_key != "adm":
                params = self.class_config(config.get("params") or {}, num_classes, "n_classes")
                config = {**config, "params": params}
            self.cond_stage_model = instantiate_from_config(config)
            if "ckpt_path" in (config.get("params") or {}):
                self.filled_stages.add("cond_stage_model")
            if not self.cond_stage_trainable:
                self.cond_stage_model.eval().requires_grad_(False)
            self._check_trainable(self.cond_stage_model)
        if isinstance(self.cond_stage_model, ClassEmbedder):
            rows = self.cond_stage_model.embedding.num_embeddings
            self.has_null_class = self.cond_dropout > 0 or rows == IMAGENET_AND_NULL
            self.num_classes = rows - self.has_null_class
        elif isinstance(self.cond_stage_model, GeneralConditioner):
            self._init_general(self.cond_stage_model)

    def _check_trainable(self, conditioner: nn.Module) -> None:
        trained = [p.requires_grad for p in conditioner.parameters()]
        if self.cond_stage_trainable and trained and not any(trained):
            raise UserError(
                f"cond_stage_trainable: {type(conditioner).__name__} freezes itself, so that nothing would be trained: "
                "set model.params.cond_stage_config.params.freeze=false, or cond_stage_trainable: false"
            )

    def _init_general(self, conditioner: GeneralConditioner) -> None:
        if self.cond_dropout:
            raise UserError("cond_dropout: a GeneralConditioner has ucg_rate in each of its emb_models instead")
        if self.concat_keys or self.shorten_cond_schedule:
            raise UserError("concat_keys and num_timesteps_cond do not go with a GeneralConditioner")
        if labels := general.labels_of(conditioner):
            self.num_classes = labels[1]

    @property
    def conditioning_key(self) -> str | None:
        """Where the condition enters the network, see DiffusionWrapper."""
        return self.model.conditioning_key

    @property
    def tolerated_keys(self) -> tuple[str, ...]:
        """Prefixes of keys that a checkpoint may have or lack: this recipe's and its stages'.

        The tables come from the config where the file (of generative-models, say) has none.
        """
        found = ["model_ema.", "logvar", "scale_factor", "ddim_", "first_stage_model.model_ema.", *self._table_names]
        for name in ("first_stage_model", "cond_stage_model"):
            found += [f"{name}.{key}" for key in getattr(getattr(self, name), "tolerated_keys", ())]
        return tuple(found)

    def rename_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under this recipe's names `own`: generative-models has others. See also `widen_input`.

        Raises:
            UserError: the file's noise schedule has another length, with which its network would draw nothing.
        """
        state = for_recipe(state, own)
        if "betas" in state and "betas" in own and len(state["betas"]) != len(own["betas"]):
            raise UserError(
                f"the file's noise schedule has {len(state['betas'])} steps, the config's {len(own['betas'])}: set "
                f"model.params.timesteps to {len(state['betas'])}"
            )
        for key in FIRST_WEIGHTS if self.widen_input else ():
            if key in state and key in own and (more := own[key].shape[1] - state[key].shape[1]) > 0:
                rank_zero_info(f"{key}: the file has {more} input channels less; they start at zero")
                state[key] = F.pad(state[key], (0, 0, 0, 0, 0, more))
        return state

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for name in ("first_stage_model", "cond_stage_model"):
            weights = [] if getattr(self, name) is None else list(getattr(self, name).parameters())
            if weights and name not in self.filled_stages and not any(p.requires_grad for p in weights):
                rank_zero_info(
                    f"warning: {name} is not trained and has random weights, for nothing was loaded into it: give a "
                    "checkpoint that holds it (model.params.ckpt_path or --init-from)"
                )

    # --- from a batch -------------------------------------------------------------------------------------------------

    def condition_input(self, batch: Mapping[str, Any], x: Tensor | None, key: str) -> Any:
        """What the conditioner gets: the batch itself for classes, texts, tokens, or a map [B, C, H, W].

        In training, entries are made null with probability `cond_dropout`.
        """
        if isinstance(self.cond_stage_model, GeneralConditioner):
            size = self._pixels() if x is None else x.shape[2:]
            if LATENTS in batch:
                size = [self.downsampling * n for n in batch[LATENTS].shape[2:]]
            return general.with_sizes(self.cond_stage_model, batch, size, self.place)
        if key == self.first_stage_key:
            return x
        value = self.value_of(batch, key)
        if key == "class_label" and self.conditioning_key != "adm":
            return {**batch, key: self.drop_labels(value)}
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.ndim > 2:
                return BaseModel.get_input(self, batch, key)
            return self.drop_labels(value) if self.num_classes is not None else value
        return self.drop_texts(value)

    def drop_texts(self, texts: Sequence[str]) -> list[str]:
        """In training, each text becomes empty with probability `cond_dropout`."""
        if not (self.training and self.cond_dropout):
            return list(texts)
        return ["" if random.random() < self.cond_dropout else text for text in texts]

    def get_learned_conditioning(self, c: Any) -> Tensor | Any:
        """Input of the conditioner -> its embedding. Text is read literally: brackets are no weights."""
        model = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(model, self.cond_stage_forward)(c)
        if isinstance(model, GeneralConditioner):
            return general.embed_batch(model, c, drop=self.training)
        if model is self.first_stage_model:
            out = self.encode_first_stage(c)
        elif isinstance(model, TextEmbedder) or not callable(getattr(model, "encode", None)):
            out = model(c)
        else:
            out = model.encode(c)
        return out.mode() if isinstance(out, DiagonalGaussianDistribution) else out

    def concat_maps(self, batch: Mapping[str, Any], size: Sequence[int]) -> list[Tensor]:
        """The maps that `concat_keys` names, each [B, c, *size]: pictures encoded, masks resized (nearest).

        The latents are a sample of the posterior in training, otherwise its mode: a picture depends on its seed alone.
        """
        maps = []
        for key in self.concat_keys:
            x = BaseModel.get_input(self, batch, key)
            if key == self.masked_image_key:
                z = self.encode_first_stage(x)
                z = z.mode() if isinstance(z, DiagonalGaussianDistribution) and not self.training else z
                maps.append(self.get_first_stage_encoding(z))
            else:
                maps.append(F.interpolate(x, size=tuple(size)))
        return maps

    def with_maps(self, c: Any, maps: list[Tensor]) -> Any:
        """An embedding with the maps of `concat_keys`: one tensor for concat, {c_concat, c_crossattn} for hybrid."""
        if not maps:
            return c
        if self.conditioning_key == "concat":
            return torch.cat([c, *maps], dim=1)
        return {"c_concat": [torch.cat(maps, dim=1)], "c_crossattn": [c]}

    @torch.no_grad()
    def get_cond(self, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The condition of a batch in the form that `sample` takes; the image itself is not needed for it."""
        if self.conditioning_key is None:
            return None
        return self.as_condition(self.with_maps(self._embedded(batch), self._latent_maps(batch)))

    @torch.no_grad()
    def map_condition(self, batch: Mapping[str, Any]) -> Tensor:
        """The part of `get_cond` that goes to the network's input channels, [B, c, h, w]; needs no text."""
        maps = self._latent_maps(batch)
        return torch.cat(maps if self.conditioning_key == "hybrid" else [self._embedded(batch), *maps], dim=1)

    def _embedded(self, batch: Mapping[str, Any]) -> Any:
        image = self.first_stage_key
        x = BaseModel.get_input(self, batch, image) if self.cond_stage_key == image else None
        return self.get_learned_conditioning(self.condition_input(batch, x, self.cond_stage_key))

    def _latent_maps(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The maps of `concat_keys` in the size of the latents, which the picture among them tells."""
        if not self.concat_keys:
            return []
        picture = self.masked_image_key if self.masked_image_key in self.concat_keys else self.concat_keys[0]
        height, width = self.value_of(batch, picture).shape[1:3]
        return self.concat_maps(batch, (height // self.downsampling, width // self.downsampling))

    def as_condition(self, cond: Any) -> dict[str, Tensor]:
        """Any official form of a condition (tensor, list, dict of lists) -> {c_concat, c_crossattn, y}."""
        if cond is None or self.conditioning_key is None:
            return {}
        if isinstance(cond, Mapping):
            return {k: joined(v) for k, v in cond.items() if k != "uncond"}
        name = {"concat": "c_concat", "adm": "y"}.get(self.conditioning_key, "c_crossattn")
        return {name: joined(cond)}

    # --- from classes or prompts --------------------------------------------------------------------------------------

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
        """The condition of each seed, with its absence as `uncond` where the model knows one.

        Args:
            classes: one each, or one for all; None = seed modulo number of classes.
            prompts: one each, or one for all; None = empty. negative_prompt: takes the place of the empty one.
            clip_skip, long_prompt, weights: see `TextEmbedder.encode`.
            height, width: of the pictures, which SDXL is told; None = image_size.
            original_size, crop, target_size: what SDXL is told of the picture before it was scaled, [height, width];
                of what was cut off its top and left, [y, x] (None = nothing); and of its size. None = height and width.
            aesthetic_score, negative_aesthetic_score: told to SDXL's refiner, the latter for `uncond` (None = 6).
        """
        if self.conditioning_key is None:
            return BaseModel.condition(self, seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
        if isinstance(self.cond_stage_model, GeneralConditioner):
            numbers = general.size_numbers(
                self.cond_stage_model, self._pixels(height, width), original_size, crop, target_size, aesthetic_score
            )
            return self.general_condition(
                self.cond_stage_model, seeds, classes, prompts, negative_prompt, numbers, negative_aesthetic_score,
                clip_skip=clip_skip, long_prompt=long_prompt, weights=weights,
            )  # fmt: skip
        if any(v is not None for v in (original_size, crop, target_size, aesthetic_score)):
            raise UserError("original_size, crop, target_size and aesthetic_score are for SDXL: this model reads none")
        if isinstance(self.cond_stage_model, TextEmbedder) and getattr(self.cond_stage_model, "use_tknz_fn", True):
            if classes is not None:
                raise UserError("the model was trained on texts: it takes no class, give a prompt")
            texts = one_each(prompts, len(seeds))
            return self._text_condition(texts, negative_prompt or "", clip_skip, long_prompt, weights)
        if self.num_classes is not None:
            labels = self.class_labels(seeds, classes, prompts or negative_prompt, self.betas.device)
            cond = self._class_condition(labels)
            if self.null_class is not None:
                cond["uncond"] = self._class_condition(torch.full_like(labels, self.null_class))
            return cond
        raise UserError(
            f"the model is conditioned on batch[{self.cond_stage_key!r}], not on classes or prompts: "
            "its condition comes from files (scripts/sample.py: --cond-from FOLDER)"
        )

    def _pixels(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of the pictures; None = image_size."""
        h, w = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height or h * self.downsampling, width or w * self.downsampling

    def _class_condition(self, labels: Tensor) -> dict[str, Any]:
        if isinstance(self.cond_stage_model, ClassEmbedder):
            return {"c_crossattn": self.cond_stage_model({self.cond_stage_model.key: labels})}
        return {"y": labels}

    def _text_condition(
        self, texts: list[str], negative: str, clip_skip: int, long_prompt: bool, weights: bool
    ) -> dict[str, Any]:
        model = self.cond_stage_model
        options: dict[str, Any] = {}
        if model.per_token:
            options = {"clip_skip": clip_skip, "long_prompt": long_prompt, "weights": weights}
            if long_prompt:  # both sides of guidance need the same length
                options["min_chunks"] = model.chunk_count([*texts, negative], weights)
        try:
            cond, uncond = model.encode(texts, **options), model.encode([negative] * len(texts), **options)
        except ValueError as e:
            raise UserError(str(e)) from e
        return {"c_crossattn": cond, "uncond": {"c_crossattn": uncond}}
