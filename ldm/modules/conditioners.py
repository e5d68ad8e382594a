"""Conditioners that are not text encoders, and the two that combine others: HybridConditioner, GeneralConditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.layers import timestep_embedding
from ldm.modules.prompts import TextEmbedder
from ldm.util import instantiate_from_config

RESIZE_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")
# GeneralConditioner's outputs: the axis on which several embedders are joined, and the name in a recipe's condition.
CONCAT_AXIS = {"vector": 1, "crossattn": 2, "concat": 1}
CONDITION_NAMES = {"vector": "y", "crossattn": "c_crossattn", "concat": "c_concat"}


class ClassEmbedder(nn.Module):
    """LDM's class labels: batch[key] int64 [B] -> [B, 1, embed_dim], a sequence of one for cross-attention.

    Args:
        embed_dim: width.
        n_classes: number of classes, a null class included.
        key: where the batch keeps the labels.
    """

    output_keys = ("crossattn",)

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """`key` stands in for the one given at construction."""
        return self.embedding(batch[key or self.key][:, None])


class LabelEmbedder(nn.Module):
    """sgm's ClassEmbedder: labels int64 [B] -> [B, embed_dim], or [B, 1, embed_dim] with `add_sequence_dim`.

    Args:
        embed_dim: width.
        n_classes: number of classes.
        add_sequence_dim: for cross-attention instead of the vector input.
    """

    input_key: str | None = None  # GeneralConditioner sets it

    def __init__(self, embed_dim: int, n_classes: int = 1000, add_sequence_dim: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)
        self.n_classes, self.add_sequence_dim = n_classes, add_sequence_dim
        self.output_keys = ("crossattn",) if add_sequence_dim else ("vector",)

    def forward(self, labels: Tensor) -> Tensor:
        z = self.embedding(labels)
        return z[:, None] if self.add_sequence_dim else z

    def get_unconditional_conditioning(self, bs: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """{input_key: the last class, which stands for "none", bs times}."""
        return {self.input_key or "cls": torch.full((bs,), self.n_classes - 1, device=device)}


class SpatialRescaler(nn.Module):
    """A picture-like condition made smaller: [B, C, H, W] -> [B, C', H * multiplier^n_stages, ...].

    Args:
        n_stages: how often to resize.
        method: interpolation.
        multiplier: factor of one resize.
        in_channels: C.
        out_channels: C' of a 1x1 convolution afterwards; None = no convolution.
        bias: of that convolution.

    Raises:
        ValueError: negative n_stages or unknown method.
    """

    output_keys = ("concat",)

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ValueError(f"got n_stages {n_stages}, expected 0 or more")
        if method not in RESIZE_METHODS:
            raise ValueError(f"got method {method!r}, expected one of {', '.join(RESIZE_METHODS)}")
        self.n_stages, self.multiplier = n_stages, multiplier
        self.interpolator = partial(F.interpolate, mode=method)
        self.remap_output = out_channels is not None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = self.interpolator(x, scale_factor=self.multiplier)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: Tensor) -> Tensor:
        """The same as calling it."""
        return self(x)


class ConcatTimestepEmbedderND(nn.Module):
    """SDXL's size and crop conditioning: each number as a sinusoidal embedding, [B, n] (or [B]) -> [B, n * outdim].

    Args:
        outdim: width per number.
    """

    output_keys = ("vector",)

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2:
            raise ValueError(f"got shape {list(x.shape)}, expected [B] or [B, n]")
        return timestep_embedding(x.flatten(), self.outdim).reshape(len(x), -1)


class HybridConditioner(nn.Module):
    """Two conditioners, one for concatenation and one for cross-attention.

    Args:
        c_concat_config, c_crossattn_config: `{target, params}` of each.
    """

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        """Lists of one tensor, the form in which official code passes conditions to the network."""
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


class GeneralConditioner(nn.Module):
    """sgm's conditioner: several embedders, each reading its key(s) of the batch, joined by kind of output.

    Args:
        emb_models: list of `{target, params, input_key | input_keys, is_trainable=False, ucg_rate=0.0,
            legacy_ucg_value=None, output_keys=None}`. ucg_rate: chance that a sample's embedding is zeroed (or, with
            legacy_ucg_value, that its input is that value), at every call; set to 0 for sampling by
            `get_unconditional_conditioning`. output_keys: vector, crossattn or concat for each output; None = what the
            embedder's class says.

    Raises:
        ValueError: an entry without input key, or whose outputs have no names.
    """

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(self._build(i, dict(entry)) for i, entry in enumerate(emb_models))

    @staticmethod
    def _build(index: int, entry: dict[str, Any]) -> nn.Module:
        where = f"emb_models[{index}] ({entry.get('target')})"
        module = instantiate_from_config({k: entry.pop(k) for k in ("target", "params") if k in entry})
        if ("input_key" in entry) == ("input_keys" in entry):
            raise ValueError(f"{where}: expected either input_key or input_keys")
        module.input_key = entry.pop("input_key", None)
        module.input_keys = list(entry.pop("input_keys", None) or [module.input_key])
        module.is_trainable = bool(entry.pop("is_trainable", False))
        module.ucg_rate = float(entry.pop("ucg_rate", 0.0))
        module.legacy_ucg_val = entry.pop("legacy_ucg_value", None)
        named = entry.pop("output_keys", None)
        module.output_keys = tuple([named] if isinstance(named, str) else named or getattr(module, "output_keys", ()))
        if not module.output_keys or set(module.output_keys) - set(CONCAT_AXIS):
            raise ValueError(f"{where}: got output_keys {module.output_keys}, expected names of {sorted(CONCAT_AXIS)}")
        if entry:
            raise ValueError(f"{where}: unknown key {sorted(entry)[0]}")
        if not module.is_trainable:
            module.eval().requires_grad_(False)
        return module

    def train(self, mode: bool = True) -> GeneralConditioner:
        """Frozen embedders stay in eval mode."""
        super().train(mode)
        for embedder in self.embedders:
            embedder.train(mode and embedder.is_trainable)
        return self

    def forward(
        self, batch: Mapping[str, Any], force_zero_embeddings: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Batch -> {vector: [B, D], crossattn: [B, L, D], concat: [B, C, H, W]}, those that there are.

        Embedders whose input key is in `force_zero_embeddings` give zeros. Text is read literally.

        Raises:
            ValueError: the batch lacks a key.
        """
        return self._join(batch, force_zero_embeddings or (), drop=True, text_options=None)

    def encode(
        self,
        batch: Mapping[str, Any],
        *,
        clip_skip: int = 1,
        long_prompt: bool = False,
        weights: bool = True,
        min_chunks: int = 1,
        force_zero_embeddings: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """As `forward`, but nothing is dropped and text goes through `TextEmbedder.encode`, which tells the options."""
        options = {"clip_skip": clip_skip, "long_prompt": long_prompt, "weights": weights, "min_chunks": min_chunks}
        return self._join(batch, force_zero_embeddings or (), drop=False, text_options=options)

    def get_unconditional_conditioning(
        self,
        batch_c: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Sequence[str] | None = None,
        force_cond_zero_embeddings: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(condition, unconditional condition), nothing dropped, given keys zeroed; batch_uc None = batch_c."""
        cond = self._join(batch_c, force_cond_zero_embeddings or (), drop=False, text_options=None)
        other = batch_c if batch_uc is None else batch_uc
        return cond, self._join(other, force_uc_zero_embeddings or (), drop=False, text_options=None)

    @property
    def text_embedder(self) -> TextEmbedder | None:
        """The first embedder that reads text token by token: ask it for `truncated_words` and `chunk_count`."""
        return next((e for e in self.embedders if isinstance(e, TextEmbedder) and e.per_token), None)

    def _join(
        self, batch: Mapping[str, Any], zero: Sequence[str], drop: bool, text_options: dict[str, Any] | None
    ) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for embedder in self.embedders:
            with nullcontext() if embedder.is_trainable else torch.no_grad():
                outputs = self._run(embedder, batch, drop, text_options)
            if len(outputs) != len(embedder.output_keys):
                raise ValueError(
                    f"{type(embedder).__name__}: got {len(outputs)} outputs, expected {embedder.output_keys}"
                )
            for key, z in zip(embedder.output_keys, outputs, strict=True):
                if drop and embedder.ucg_rate > 0 and embedder.legacy_ucg_val is None:
                    keep = torch.full((len(z),), 1 - embedder.ucg_rate, device=z.device).bernoulli()
                    z = z * keep.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
                found.setdefault(key, []).append(torch.zeros_like(z) if embedder.input_key in zero else z)
        return {key: torch.cat(parts, CONCAT_AXIS[key]) for key, parts in found.items()}

    @staticmethod
    def _run(
        embedder: nn.Module, batch: Mapping[str, Any], drop: bool, text_options: dict[str, Any] | None
    ) -> tuple[Tensor, ...]:
        if missing := [k for k in embedder.input_keys if k not in batch]:
            raise ValueError(f"got a batch with {sorted(batch)}, expected {missing[0]} for {type(embedder).__name__}")
        values = [batch[k] for k in embedder.input_keys]
        if drop and embedder.legacy_ucg_val is not None:
            values[0] = _replace(values[0], embedder.ucg_rate, embedder.legacy_ucg_val)
        if text_options and isinstance(embedder, TextEmbedder) and embedder.per_token:
            out = embedder.encode(*values, **text_options)
        else:
            out = embedder(*values)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _replace(values: Tensor | Sequence[Any], rate: float, by: Any) -> Tensor | list[Any]:
    """A copy in which each sample is `by` with probability `rate`."""
    copy = values.clone() if isinstance(values, Tensor) else list(values)
    for i in torch.nonzero(torch.rand(len(copy)) < rate).flatten().tolist():
        copy[i] = by
    return copy
