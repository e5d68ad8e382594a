"""Pictures with a class for every pixel: a folder of images and a folder of masks."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data.base import CROP_X, CROP_Y, Size, check_channels, parse_size
from ldm.data.entries import SPLIT_FOLDERS, Entries, choose_split, suffix
from ldm.data.image import FileImages
from ldm.data.pixels import EXTENSIONS, UNREADABLE, Fit
from ldm.data.sources import Source, open_source
from ldm.util import UserError

IGNORE = 255  # the label of pixels that do not count
IMAGES, MASKS, NAMES = "images", "masks", "classes.txt"
LAYOUT = f"""expected
  ROOT/{IMAGES}/a.jpg and ROOT/{MASKS}/a.png: one label for each pixel, {IGNORE} where none counts
  ROOT/{NAMES}: the names of the classes, one a line (if it is absent they are numbers)
and, if you wish, both folders inside ROOT/train and ROOT/val; ROOT may be a .zip"""


class SegmentationFolder(FileImages):
    """A folder (or a .zip) of pictures and masks.

    Batches hold `image` float32 [B, H, W, C] in [-1, 1], `mask` int64 [B, H, W] (255: not counted), `relpath`. A mask
    is a grey or palette PNG whose values are the labels; picture and mask are scaled, cut and mirrored alike.

    Args:
        root: holds images/ and masks/, or train/ and val/ with these in them.
        split: train, validation, test, or all; without val/ a fixed tenth of the pictures validates.
        size: pixels, or [height, width].
        channels: 1 or 3.
        random_crop: cut at a random place instead of the centre.
        flip_p: probability of a left-right flip, or `alternate`.
        interpolation: of the pictures; masks take the nearest label.
        val_fraction, split_by, max_unreadable, verify: see ImageFolder.

    Raises:
        UserError: no such folders, pictures without a mask, masks of another size, labels out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "all",
        size: Size = 256,
        channels: int = 3,
        random_crop: bool = False,
        flip_p: float | str = 0.0,
        interpolation: str = "bicubic",
        val_fraction: float = 0.1,
        split_by: str = "hash",
        max_unreadable: float = 0.05,
        verify: int = 1000,
    ) -> None:
        source = open_source(root)
        found, parts = find_pairs(source)
        entries = choose_split(found, parts, split, val_fraction, split_by)
        fit = Fit(parse_size(size), check_channels(channels), "crop", random_crop, interpolation)
        self._listed = bool(found.class_names)
        if not self._listed:
            found.class_names = [str(c) for c in range(highest_label(source, found.names) + 1)]
        entries.class_names = found.class_names
        super().__init__(source, entries, fit, flip_p, 0, False, 0.0, max_unreadable, verify)

    def sample(self, index: int, draws: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        scaled, place = self.fit.scaled(self.read(index)), (draws[CROP_Y], draws[CROP_X])
        return {"image": self.fit.cut(scaled, *place), "mask": self.fit.cut(self._mask(index, scaled), *place)}

    def _mask(self, index: int, scaled: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 1], scaled as the picture was."""
        name = self.entries.names[index]
        labels = read_mask(self.source, mask_of(name))
        known = np.unique(labels[labels != IGNORE])
        if len(known) and known[-1] >= len(self.class_names or ()):
            raise UserError(
                f"{self.source.where(mask_of(name))} holds the label {known[-1]}, but {NAMES} names "
                f"{len(self.class_names or ())} classes (0 to {len(self.class_names or ()) - 1}; {IGNORE}: not counted)"
            )
        with Image.open(io.BytesIO(self.read(index))) as picture:
            size = picture.height, picture.width
        if labels.shape != size:
            raise UserError(
                f"{self.source.where(mask_of(name))} is {labels.shape[0]}x{labels.shape[1]}, its picture "
                f"{size[0]}x{size[1]}: a mask has a label for every pixel of its picture"
            )
        file = io.BytesIO()
        Image.fromarray(labels).save(file, "BMP")
        nearest = Fit(self.size, 1, "crop", self.fit.random, "nearest")
        return nearest.scaled(file.getvalue())

    def finish(self, key: str, x: Tensor) -> Tensor:
        return x[..., 0].long() if key == "mask" else x

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        return {"relpath": [self.entries.names[i] for i in indices]}


def mask_of(name: str) -> str:
    """The mask's file name: train/images/a.jpg -> train/masks/a.png."""
    folder, _, file = name.rpartition(f"{IMAGES}/")
    return f"{folder}{MASKS}/{file.rpartition('.')[0]}.png"


def find_pairs(source: Source) -> tuple[Entries, dict[str, list[int]] | None]:
    """All pictures that have a mask, and the positions of each split if there are split folders.

    Raises:
        UserError: no pictures, or some without a mask.
    """
    names = [n for n in source.names if f"/{IMAGES}/" in f"/{n}" and suffix(n) in EXTENSIONS]
    if not names:
        raise UserError(f"no pictures in {source.where(IMAGES)}\n{LAYOUT}")
    there = set(source.names)
    missing = [mask_of(n) for n in names if mask_of(n) not in there]
    if missing:
        first = ", ".join(source.where(m) for m in missing[:3])
        raise UserError(f"{len(missing)} of {len(names)} pictures have no mask, e.g. {first}\n{LAYOUT}")
    classes = [w.strip() for w in _text(source, NAMES).splitlines() if w.strip()]
    entries = Entries(names, np.zeros(len(names), np.int64), classes)
    tops = [n.partition("/")[0].lower() for n in names]
    if not any(SPLIT_FOLDERS.get(t) == "train" for t in tops):
        return entries, None
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for i, top in enumerate(tops):
        if top in SPLIT_FOLDERS:
            parts[SPLIT_FOLDERS[top]].append(i)
    return entries, parts


def _text(source: Source, name: str) -> str:
    if name not in source.names:
        return ""
    try:
        return source.read(name).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{source.where(name)} cannot be read as UTF-8 text: {e}") from e


def read_mask(source: Source, name: str) -> np.ndarray:
    """uint8 [H, W] of labels; a palette's indices are the labels.

    Raises:
        UserError: a picture in colours.
        one of UNREADABLE.
    """
    with Image.open(io.BytesIO(source.read(name))) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.max(initial=0) > 255:
        raise UserError(f"{source.where(name)} must hold one label of 0 to 255 for each pixel, got {labels.shape}")
    return labels.astype(np.uint8)


def highest_label(source: Source, names: list[str]) -> int:
    """Of all masks that can be read; the others are left out later."""
    highest = 0
    for name in names:
        try:
            labels = read_mask(source, mask_of(name))
        except UNREADABLE:
            continue
        highest = max(highest, int(labels[labels != IGNORE].max(initial=0)))
    return highest
