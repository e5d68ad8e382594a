"""Where the condition of a model comes from that is conditioned on maps: files, or the run's own validation data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.annotated import corner_tokens
from ldm.picture_files import eight_bit, open_image, read_image, read_mask
from ldm.util import UserError, instantiate_from_config

DATA = "data"  # --cond-from without a folder
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Sample = dict[str, Any]  # one entry of a batch: arrays [H, W, C], a text, a number
Samples = tuple[int, Callable[[int], Sample]]  # how many there are, and the i-th


def samples_of(model: Any, config: Mapping[str, Any], where: str) -> Samples:
    """The conditions that `where` holds: a folder of pictures, or `data` for the config's validation data.

    Raises:
        UserError: nothing there.
    """
    layouts = reads_layouts(model)
    endings, what = ((".json",), "layouts (.json)") if layouts else (ENDINGS, "pictures")
    files = sorted(p for p in Path(where).glob("*") if p.suffix.lower() in endings and not p.stem.endswith("_mask"))
    if where == DATA and not files:  # a folder of that name is where data sets are kept
        data = validation_data(config)
        return len(data), lambda i: dict(data[i])
    if not files:
        raise UserError(f"--cond-from {where}: expected a folder with {what}, or `{DATA}` for the validation data")
    if layouts:
        return len(files), lambda i: {model.cond_stage_key: read_layout(model, files[i])}
    return len(files), lambda i: read_condition(model, files[i])


def validation_data(config: Mapping[str, Any]) -> Any:
    """The validation set of a run's config, or what stands for it."""
    params = (config.get("data") or {}).get("params") or {}
    split = next((s for s in ("validation", "test", "train") if params.get(s)), None)
    if split is None:
        raise UserError(f"--cond-from {DATA}: the run's config names no data; give a folder with pictures")
    data = instantiate_from_config(config["data"])
    data.prepare_data()
    data.setup({"validation": "validate", "test": "test", "train": "fit"}[split])
    return data.datasets[split]


# --- files ------------------------------------------------------------------------------------------------------------


def read_condition(model: Any, file: Path) -> Sample:
    """What the model is conditioned on, from a picture (and its mask, x_mask.png beside x.png, white = repaint).

    Raises:
        UserError: the model's condition is no picture, or the mask is missing.
    """
    keys = [*getattr(model, "concat_keys", ()), getattr(model, "cond_stage_key", None)]
    masked = {"mask", getattr(model, "masked_image_key", None)} & set(keys)
    sample: Sample = {}
    for key in keys if getattr(model, "conditioning_key", None) in ("concat", "hybrid") else ():
        if masked and key in masked:
            sample |= masked_picture(file, model)
        elif key == model.cond_stage_key and model.conditioning_key == "hybrid":
            continue  # a text or a class
        elif (labels := label_count(model)) is not None and key == model.cond_stage_key:
            sample[key] = one_hot(file, labels)
        else:
            sample[key] = signed(file, channels_of(model))
    if not sample:
        raise UserError(f"{type(model).__name__} is not conditioned on pictures: leave --cond-from out")
    return sample


def channels_of(model: Any) -> int:
    """1 where the first stage is of grey pictures, else 3."""
    first = getattr(getattr(model.first_stage_model, "encoder", None), "conv_in", None)
    return 1 if getattr(first, "in_channels", 3) == 1 else 3


def signed(file: Path, channels: int) -> Tensor:
    """A picture, float32 [H, W, channels] in [-1, 1]."""
    x = torch.from_numpy(read_image(file, lambda line: None)[0].astype(np.float32))
    if channels == 1:
        x = (x * torch.tensor([0.299, 0.587, 0.114])).sum(dim=2, keepdim=True)  # ITU-R BT.601, as PIL
    return x / 127.5 - 1


def masked_picture(file: Path, model: Any) -> Sample:
    """`mask` [H, W, 1], 1 = repaint, and the picture with grey there, as `ldm.data.masks` makes them.

    The released inpainting model, whose mask is not among the model's `concat_keys`, has black there.
    """
    mask_file = file.with_name(f"{file.stem}_mask.png")
    if not mask_file.is_file():
        raise UserError(f"{file} has no mask: expected {mask_file} (white = repaint)")
    x = signed(file, channels_of(model))
    mask = torch.from_numpy(read_mask(mask_file, (x.shape[1], x.shape[0]), lambda line: None))[..., None].float()
    holes = x * (1 - mask) if "mask" in model.concat_keys else (x + 1) * (1 - mask) - 1
    return {"mask": mask, model.masked_image_key: holes}


def label_count(model: Any) -> int | None:
    """Number of labels of the map that a model of segmentations is conditioned on."""
    mapper = getattr(getattr(model, "cond_stage_model", None), "channel_mapper", None)
    channels = getattr(mapper, "in_channels", 3)
    return None if channels in (1, 3) else channels


def one_hot(file: Path, labels: int) -> Tensor:
    """A picture of label numbers (grey or palette) -> float32 [H, W, labels]."""
    picture = open_image(file)
    numbers = np.asarray(picture if picture.mode in ("L", "P") else eight_bit(picture).convert("L"))
    if numbers.max() >= labels:
        raise UserError(f"{file} has label {numbers.max()}, expected numbers below {labels}")
    return F.one_hot(torch.from_numpy(numbers.astype(np.int64)), labels).float()


# --- layouts ----------------------------------------------------------------------------------------------------------


def reads_layouts(model: Any) -> bool:
    """Whether the model is conditioned on tokens that are no text: objects and their boxes."""
    return not getattr(getattr(model, "cond_stage_model", None), "use_tknz_fn", True)


def read_layout(model: Any, file: Path) -> Tensor:
    """The tokens int64 [L] of a JSON file: a list of `{"category": number, "box": [x, y, width, height]}`.

    A box is a share of the picture, from its upper left corner. Three tokens an object as in
    `AnnotatedObjectsOpenImages`; where two are left over they say that nothing was cropped.

    Raises:
        UserError: no such list, or more objects than the model has room for.
    """
    table = model.cond_stage_model.transformer
    length, count = table.max_seq_len, table.num_tokens
    try:
        objects = [(int(o["category"]), *(float(v) for v in o["box"])) for o in json.loads(file.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(
            f'{file} is no layout ({e}): expected [{{"category": 3, "box": [0.1, 0.2, 0.5, 0.5]}}, ...], each box '
            "x, y, width and height as a share of the picture"
        ) from e
    if len(objects) > length // 3 or not objects:
        raise UserError(f"{file} has {len(objects)} objects, expected 1 to {length // 3}")
    row: list[int] = []
    for category, *box in objects:
        inside = len(box) == 4 and min(box) >= 0 and max(box[0] + box[2], box[1] + box[3]) <= 1 + 1e-6
        if not (0 <= category < count and inside):
            raise UserError(f"{file}: category {category}, box {box}: expected 0..{count - 1}, and a box within 0..1")
        row += [category, *corner_tokens(tuple(box), count)]
    row += [count - 1] * (3 * (length // 3) - len(row))
    return torch.tensor(row + (corner_tokens((0.0, 0.0, 1.0, 1.0), count) if length % 3 == 2 else []))


# --- conditions -------------------------------------------------------------------------------------------------------


def stacked(samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    """Samples of one shape as a batch."""
    first, batch = samples[0], {}
    for key, value in first.items():
        values = [s[key] for s in samples]
        if isinstance(value, (Tensor, np.ndarray)):
            batch[key] = torch.stack([torch.as_tensor(v) for v in values]).to(device)
        elif isinstance(value, (int, np.integer)):
            batch[key] = torch.tensor(values, device=device)
        else:
            batch[key] = values
    return batch


def shape_of(sample: Sample) -> tuple[Any, ...]:
    """Samples of the same one can be one batch."""
    return tuple(tuple(np.shape(v)) for v in sample.values() if isinstance(v, (Tensor, np.ndarray)))


def condition_from(model: Any, samples: Sequence[Sample], seeds: Sequence[int], request: Mapping[str, Any]) -> Any:
    """The condition of each seed: maps from its sample; text or class from the request, else from the sample.

    request: classes, prompts, negative_prompt and other arguments of `model.condition`.
    """
    batch = stacked(samples, next(model.parameters()).device)
    if hasattr(model, "conditioner"):
        return model.get_cond(batch)
    key, asked = getattr(model, "cond_stage_key", None), dict(request)
    found = batch.get(key)
    if isinstance(found, list):
        asked["prompts"] = asked.get("prompts") or found
    elif isinstance(found, Tensor) and found.ndim == 1 and asked.get("classes") is None:
        asked["classes"] = found.tolist()
    own = {}
    if getattr(model, "conditioning_key", None) == "hybrid" or found is None or asked != dict(request):
        own = model.condition(seeds, **asked) or {}
    if getattr(model, "conditioning_key", None) not in ("concat", "hybrid"):
        return own or model.get_cond(batch)
    maps = model.map_condition(batch)
    check_size(model, maps)
    return {**own, "c_concat": with_mask(model, maps, batch)}


def check_size(model: Any, maps: Tensor) -> None:
    """Raises UserError for maps of a size that the network cannot halve as often as it does."""
    multiple = 2 ** (getattr(model.model.diffusion_model, "levels", 1) - 1)
    height, width = maps.shape[2:]
    if height % multiple or width % multiple:
        f = model.downsampling
        raise UserError(
            f"the condition makes latents of {width}x{height}, for pictures of {width * f}x{height * f}: the network "
            f"takes latents whose sides are multiples of {multiple}; crop or resize the pictures"
        )


def with_mask(model: Any, maps: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The released inpainting model was trained with the mask, in {-1, 1}, behind what its config names."""
    room = getattr(model.model.diffusion_model, "in_channels", 0) - model.channels - maps.shape[1]
    if room != 1 or "mask" not in batch:
        return maps
    mask = 2 * batch["mask"].permute(0, 3, 1, 2) - 1
    return torch.cat([maps, F.interpolate(mask, size=maps.shape[2:])], dim=1)
