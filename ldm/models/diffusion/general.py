"""Conditions of a `GeneralConditioner` (SDXL, generative-models): its inputs by name, sizes and crops among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.classes import ClassLabels
from ldm.modules.conditioners import CONDITION_NAMES, ClassEmbedder, GeneralConditioner, LabelEmbedder
from ldm.modules.prompts import TextEmbedder
from ldm.util import UserError

ORIGINAL, CROP, TARGET = "original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"
AESTHETIC = "aesthetic_score"
Pair = Sequence[int]


def named(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """vector, crossattn, concat -> the names of a recipe's condition."""
    return {CONDITION_NAMES.get(k, k): v for k, v in outputs.items()}


def input_keys(conditioner: GeneralConditioner, *kinds: type[nn.Module]) -> list[str]:
    """What the conditioner reads from a batch; only embedders of these kinds if any are given."""
    chosen = [e for e in conditioner.embedders if not kinds or isinstance(e, kinds)]
    return list(dict.fromkeys(key for e in chosen for key in e.input_keys))


def texts_of(conditioner: GeneralConditioner) -> list[str]:
    """Keys of the batch that hold text."""
    return input_keys(conditioner, TextEmbedder)


def labels_of(conditioner: GeneralConditioner) -> tuple[str, int] | None:
    """(key, number of classes) of the first embedder of class labels."""
    for embedder in conditioner.embedders:
        if isinstance(embedder, (LabelEmbedder, ClassEmbedder)):
            return embedder.input_keys[0], embedder.embedding.num_embeddings
    return None


def with_sizes(conditioner: GeneralConditioner, batch: Mapping[str, Any], size: Pair, device: Any) -> dict[str, Any]:
    """The batch with the sizes that it does not tell: pictures of `size` (height, width), not scaled and not cut."""
    wanted = set(input_keys(conditioner)) - set(batch)
    known = {ORIGINAL: size, CROP: (0, 0), TARGET: size}
    n = len(next(iter(batch.values())))
    return {**batch, **{k: torch.tensor(v, device=device).expand(n, 2) for k, v in known.items() if k in wanted}}


def check_inputs(conditioner: GeneralConditioner, batch: Mapping[str, Any]) -> None:
    """Raises UserError where the batch lacks what the conditioner reads."""
    if missing := [k for k in input_keys(conditioner) if k not in batch]:
        raise UserError(f"the batch has no key {missing[0]!r} for the conditioner; the data set gives {sorted(batch)}")


def embed_batch(conditioner: GeneralConditioner, batch: Mapping[str, Any], drop: bool) -> dict[str, Tensor]:
    """A batch's condition {c_crossattn, y, c_concat}; drop: parts of it become null by `ucg_rate`."""
    check_inputs(conditioner, batch)
    return named(conditioner(batch) if drop else conditioner.encode(batch, weights=False))


def reads_size(conditioner: GeneralConditioner) -> bool:
    """Whether the size of the pictures is part of the condition."""
    return bool({ORIGINAL, TARGET} & set(input_keys(conditioner)))


def size_numbers(
    conditioner: GeneralConditioner,
    size: Pair,
    original_size: Pair | None,
    crop: Pair | None,
    target_size: Pair | None,
    aesthetic_score: float | None,
) -> dict[str, list[float]]:
    """The numbers of each size key that the conditioner reads; size (height, width) where nothing is given.

    Raises:
        UserError: a number was given that the model does not read.
    """
    given = {ORIGINAL: original_size, CROP: crop, TARGET: target_size, AESTHETIC: aesthetic_score}
    names = {ORIGINAL: "original_size", CROP: "crop", TARGET: "target_size", AESTHETIC: "aesthetic_score"}
    default = {ORIGINAL: size, CROP: (0, 0), TARGET: size, AESTHETIC: 6.0}
    keys = input_keys(conditioner)
    numbers = {}
    for key, value in given.items():
        if key not in keys:
            if value is not None:
                raise UserError(f"{names[key]}: the model was not trained with it (its conditioner reads {keys})")
            continue
        value = default[key] if value is None else value
        numbers[key] = [float(v) for v in ([value] if isinstance(value, (int, float)) else value)]
        if len(numbers[key]) != (1 if key == AESTHETIC else 2):
            raise UserError(f"{names[key]}: got {value}, expected {'one number' if key == AESTHETIC else '[y, x]'}")
    return numbers


def trained_on_zeros(conditioner: GeneralConditioner, keys: Sequence[str]) -> list[str]:
    """Those of the input keys whose absence is an embedding of zeros.

    That is so where training dropped them (`ucg_rate`) without a `legacy_ucg_value`. Released inference configs leave
    the rate out: there it is the model with two text towers, SDXL base, that was trained so.
    """
    towers = sum(isinstance(e, TextEmbedder) for e in conditioner.embedders)
    found = []
    for embedder in conditioner.embedders:
        dropped = embedder.ucg_rate > 0 and embedder.legacy_ucg_val is None
        if dropped or (towers > 1 and isinstance(embedder, TextEmbedder) and embedder.legacy_ucg_val is None):
            found += [k for k in embedder.input_keys if k in keys]
    return list(dict.fromkeys(found))


def one_each(prompts: Sequence[str] | None, n: int) -> list[str]:
    """n prompts; one is for all, None is the empty one."""
    texts = list(prompts or [""])
    texts = texts * n if len(texts) == 1 else texts
    if len(texts) != n:
        raise UserError(f"got {len(texts)} prompts for {n} pictures, expected one each (or one for all)")
    return texts


class GeneralConditions(ClassLabels):
    """A recipe whose conditioner may be a `GeneralConditioner`."""

    def general_condition(
        self,
        conditioner: GeneralConditioner,
        seeds: Sequence[int],
        classes: Sequence[int] | None,
        prompts: Sequence[str] | None,
        negative_prompt: str | None,
        numbers: Mapping[str, Sequence[float]],
        negative_score: float,
        **text: Any,
    ) -> dict[str, Any]:
        """The condition of each seed, with its absence as `uncond` where the model knows one.

        Args:
            classes, prompts, negative_prompt: as for `condition`.
            numbers: from `size_numbers`; negative_score: aesthetic score of `uncond`.
            text: clip_skip, long_prompt and weights of `TextEmbedder.encode`.

        Raises:
            UserError: the conditioner reads maps, or the request does not fit it.
        """
        n, keys, device = len(seeds), texts_of(conditioner), next(self.model.parameters()).device
        negative, absent = negative_prompt or "", [] if negative_prompt else list(keys)
        if prompts is not None and not keys:
            raise UserError(
                f"the model reads {', '.join(input_keys(conditioner)) or 'no condition'}: it takes no prompt"
            )
        batch: dict[str, Any] = {k: torch.tensor(v, device=device).expand(n, -1) for k, v in numbers.items()}
        if self.num_classes is not None:
            key = labels_of(conditioner)[0]
            batch[key], absent = self.class_labels(seeds, classes, None, device), [*absent, key]
        elif classes is not None:
            raise UserError("the model was not trained on classes: it takes no class")
        if others := set(input_keys(conditioner)) - set(batch) - set(keys):
            raise UserError(
                f"the model is conditioned on batch[{min(others)!r}]: its condition comes from files (--cond-from)"
            )
        other = {**batch, **{k: [negative] * n for k in keys}}
        batch |= {k: one_each(prompts, n) for k in keys}
        if AESTHETIC in other:
            other[AESTHETIC] = torch.full_like(other[AESTHETIC], negative_score)
        if keys and text["long_prompt"]:  # both sides of guidance need the same length
            embedders = [e for e in conditioner.embedders if isinstance(e, TextEmbedder) and e.per_token]
            prompts = [*batch[keys[0]], negative]
            text["min_chunks"] = max(e.chunk_count(prompts, text["weights"]) for e in embedders)
        return _both_sides(conditioner, batch, other, trained_on_zeros(conditioner, absent), text)


def _both_sides(
    conditioner: GeneralConditioner, batch: dict[str, Any], other: dict[str, Any], zeroed: list[str], text: dict
) -> dict[str, Any]:
    try:
        cond = named(conditioner.encode(batch, **text))
        if texts_of(conditioner) or zeroed:
            cond["uncond"] = named(conditioner.encode(other, **text, force_zero_embeddings=zeroed))
    except ValueError as e:
        raise UserError(str(e)) from e
    return cond
