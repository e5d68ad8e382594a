"""Pictures of scenes with boxes: Open Images' objects as tokens, for layout-to-image transformers."""

from __future__ import annotations

import collections
import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.base import CROP_X, CROP_Y, FLIP, SCALE
from ldm.data.filelist import FileList
from ldm.util import UserError

# What two of taming-transformers' lists stand for here; a text file may be named instead.
TOP_300 = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
UNIFIED = "taming.data.open_images_helper.open_images_unify_categories_for_coco"
PEOPLE = {"Man": "Person", "Woman": "Person", "Boy": "Person", "Girl": "Person"}
CROPS = ("none", "center", "random-1d", "random-2d")
Box = tuple[float, float, float, float]  # left, top, width, height in [0, 1]


@dataclass(frozen=True)
class Thing:
    """An object: its category's number, its box in the picture, and Open Images' flags."""

    category: int
    box: Box
    group: bool
    occluded: bool
    depiction: bool
    inside: bool


class AnnotatedObjectsOpenImages(FileList):
    """Open Images with boxes. `data_path` holds, at any depth, `<split>-annotations-bbox.csv`, a
    `class-descriptions*.csv` and the pictures, `<ImageID>.jpg`.

    Batches hold `image` float32 [B, H, W, 3] in [-1, 1], `objects_bbox` int64 [B, 3 max_objects_per_image (+ 2)],
    `file_name`, `annotations` (a list of category names per picture).

    An object is three tokens: category (plus the number of categories times its flags), and the upper left and lower
    right corner on a grid of sqrt(no_tokens) x sqrt(no_tokens) places. `no_tokens - 1` fills the rest.

    Args:
        data_path: folder.
        split: train or validation.
        keys: hand out only these keys.
        target_image_size: side of the pictures.
        min_object_area: smaller boxes (as a share of the picture) are left out.
        min_objects_per_image, max_objects_per_image: pictures with fewer or more are left out.
        crop_method: none (the picture is squeezed), center, random-1d (a square along the longer side), random-2d (a
            square of at least half the shorter side).
        random_flip: mirror every other picture.
        no_tokens: of the vocabulary.
        use_group_parameter, use_additional_parameters: say in the category token whether the box holds a group; and
            whether the object is occluded, a depiction, or seen from inside.
        encode_crop: two more tokens at the end: the corners of the crop.
        category_allow_list_target: text file with one category name a line; the official name stands for the 300 most
            frequent categories; empty: all.
        category_mapping_target: text file with `name<TAB>new name` a line; the official name makes men, women, boys and
            girls persons; empty: none.
        no_object_classes: number of categories, where it is not to be counted.

    Raises:
        UserError: files are missing or no picture is left.
    """

    def __init__(
        self,
        data_path: str,
        split: str,
        keys: Sequence[str] | None,
        target_image_size: int,
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
        crop_method: str,
        random_flip: bool,
        no_tokens: int,
        use_group_parameter: bool,
        encode_crop: bool,
        category_allow_list_target: str = "",
        category_mapping_target: str = "",
        no_object_classes: int | None = None,
        use_additional_parameters: bool = False,
    ) -> None:
        if crop_method not in CROPS:
            raise UserError(f"crop_method must be one of {', '.join(CROPS)}, got {crop_method!r}")
        root = Path(data_path).expanduser()
        rows = _read(root, f"*{split}-annotations-bbox.csv", split)
        names = {r[0]: r[1] for r in csv.reader(_find(root, "*class-descriptions*.csv", split).open(encoding="utf-8"))}
        self.category_names = _categories(rows, names, category_allow_list_target, category_mapping_target)
        found = _things(rows, self.category_names, names, category_mapping_target, min_object_area)
        files = {p.stem: p.relative_to(root).as_posix() for p in sorted(root.rglob("*.jpg"))}
        low, high = min_objects_per_image, max_objects_per_image
        self.things = {files[i]: t for i, t in found.items() if i in files and low <= len(t) <= high}
        if not self.things:
            raise UserError(
                f"no picture of {split} is left in {root}: {len(found)} are annotated, {len(files)} are there as "
                f"<ImageID>.jpg, and each needs {low} to {high} objects"
            )
        self.max_objects, self.no_tokens, self.crop_method = high, no_tokens, crop_method
        self.use_group, self.use_more, self.encode_crop = use_group_parameter, use_additional_parameters, encode_crop
        self.no_object_classes = no_object_classes or len(set(self.category_names.values()))
        self._sizes: dict[int, tuple[int, int]] = {}
        flip = 0.5 if random_flip else 0.0
        super().__init__(sorted(self.things), str(root), target_image_size, flip_p=flip, keys=keys, verify=0)

    @property
    def cacheable(self) -> bool:
        return False

    # -- pictures --

    def crop_of(self, size: tuple[int, int], draws: np.ndarray) -> Box:
        """The part of a picture of (width, height) that is shown, as a share of it."""
        w, h = size
        if self.crop_method == "none":
            return 0.0, 0.0, 1.0, 1.0
        side = float(min(w, h))
        if self.crop_method == "random-2d":
            side *= 0.5 + 0.5 * float(draws[SCALE])
        x, y = (0.5, 0.5) if self.crop_method == "center" else (float(draws[CROP_X]), float(draws[CROP_Y]))
        return (w - side) * x / w, (h - side) * y / h, side / w, side / h

    def sample(self, index: int, draws: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        with Image.open(io.BytesIO(self.read(index))) as picture:
            self._sizes[index] = picture.size
            x, y, w, h = self.crop_of(picture.size, draws)
            box = (x * picture.width, y * picture.height, (x + w) * picture.width, (y + h) * picture.height)
            small = picture.convert("RGB").resize(self.size, Image.Resampling.BICUBIC, box=box)
        return {"image": np.asarray(small)}

    # -- tokens --

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        names = [self.entries.names[i] for i in indices]
        rows = zip(names, indices, draws, strict=True)
        tokens = [self.tokens(self.things[n], self.crop_of(self._sizes[i], d), self.flips(d)) for n, i, d in rows]
        by_number = {number: name for name, number in self.category_names.items()}
        return {
            "objects_bbox": torch.tensor(tokens),
            "file_name": [Path(n).name for n in names],
            "annotations": [[by_number[t.category] for t in self.things[n]] for n in names],
        }

    def flips(self, draws: np.ndarray) -> bool:
        return bool(draws[FLIP] < self.flip_p)

    def tokens(self, things: Iterable[Thing], crop: Box, flipped: bool = False) -> list[int]:
        """Objects, those in the crop, as tokens; of one length for every picture."""
        row: list[int] = []
        for thing in things:
            box = _inside(thing.box, crop, flipped)
            if box is not None:
                row += [self._category(thing), *self.corners(box)]
        row += [self.no_tokens - 1] * (3 * self.max_objects - len(row))
        if self.encode_crop:
            x, y, w, h = crop
            row += self.corners((1 - x - w if flipped else x, y, w, h))
        return row

    def _category(self, thing: Thing) -> int:
        flags = int(thing.group) if self.use_group else 0
        if self.use_more:
            flags += 2 * thing.occluded + 4 * thing.depiction + 8 * thing.inside
        return thing.category + self.no_object_classes * flags

    def corners(self, box: Box) -> list[int]:
        """Tokens of the upper left and of the lower right corner."""
        return corner_tokens(box, self.no_tokens)


def corner_tokens(box: Box, no_tokens: int) -> list[int]:
    """The upper left and the lower right corner of a box as places on a grid of sqrt(no_tokens) a side."""
    x, y, w, h = box
    n = int(math.sqrt(no_tokens))
    return [round(v * (n - 1)) * n + round(u * (n - 1)) for u, v in ((x, y), (x + w, y + h))]


def _inside(box: Box, crop: Box, flipped: bool) -> Box | None:
    """The box within the crop, as a share of it; None where nothing of it is seen."""
    left, top = ((box[i] - crop[i]) / crop[i + 2] for i in (0, 1))
    right, bottom = (left + box[2] / crop[2], top + box[3] / crop[3])
    left, top, right, bottom = (min(1.0, max(0.0, v)) for v in (left, top, right, bottom))
    if right <= left or bottom <= top:
        return None
    return 1 - right if flipped else left, top, right - left, bottom - top


def _find(root: Path, pattern: str, split: str) -> Path:
    found = sorted(root.rglob(pattern))
    if not found:
        raise UserError(
            f"{pattern} is not in {root}: get the boxes and class names of Open Images ({split}) from "
            "https://storage.googleapis.com/openimages/web/download.html; for your own pictures: "
            "data.params.root=FOLDER"
        )
    return found[0]


def _read(root: Path, pattern: str, split: str) -> list[dict[str, str]]:
    with _find(root, pattern, split).open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _lines(path: str) -> list[str]:
    try:
        return [line for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as e:
        raise UserError(f"the list of categories {path} cannot be read ({e}); expected one name a line") from e


def _mapping(target: str) -> dict[str, str]:
    if not target or target == UNIFIED:
        return PEOPLE if target else {}
    pairs = (line.partition("\t") for line in _lines(target))
    return {old.strip(): new.strip() for old, _, new in pairs}


def _categories(rows: list[dict[str, str]], names: dict[str, str], allow: str, mapping: str) -> dict[str, int]:
    """Numbers of the categories in use, by name."""
    new = _mapping(mapping)
    seen = collections.Counter(names.get(r["LabelName"], r["LabelName"]) for r in rows)
    counts: collections.Counter[str] = collections.Counter()
    for name, count in seen.items():
        counts[new.get(name, name)] += count
    if allow and allow != TOP_300:
        return {name.strip(): i for i, name in enumerate(_lines(allow))}
    kept = [name for name, _ in counts.most_common(300)] if allow else list(counts)
    return {name: i for i, name in enumerate(sorted(kept))}


def _things(
    rows: list[dict[str, str]], categories: dict[str, int], names: dict[str, str], mapping: str, least: float
) -> dict[str, list[Thing]]:
    """Objects by picture: of known categories and large enough."""
    new = _mapping(mapping)
    things: dict[str, list[Thing]] = collections.defaultdict(list)
    for r in rows:
        name = names.get(r["LabelName"], r["LabelName"])
        category = categories.get(new.get(name, name))
        x, y = float(r["XMin"]), float(r["YMin"])
        box = x, y, float(r["XMax"]) - x, float(r["YMax"]) - y
        if category is None or box[2] * box[3] < least:
            continue
        flags = (r.get(k, "0") == "1" for k in ("IsGroupOf", "IsOccluded", "IsDepiction", "IsInside"))
        things[r["ImageID"]].append(Thing(category, box, *flags))
    return things
