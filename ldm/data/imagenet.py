"""ImageNet (Deng et al. 2009; ILSVRC 2012), and high/low resolution pairs for super-resolution."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.base import CROP_X, CROP_Y, SCALE, check_channels, data_dir, parse_size
from ldm.data.degradation import DEGRADATIONS, degrade
from ldm.data.entries import Entries, choose_split, find_entries
from ldm.data.filelist import FullOpenImagesTrain, locate
from ldm.data.image import FileImages
from ldm.data.pixels import Fit, as_array, open_image
from ldm.data.sources import Folder, Source, open_source
from ldm.util import UserError

log = logging.getLogger(__name__)

BROKEN = "n06596364/n06596364_9591.JPEG"  # the official code leaves this image out
CONFIG_KEYS = ("size", "data_root", "keep_orig_class_label", "sub_indices", "ImageNetTrain", "ImageNetValidation")


def find_imagenet(split: str, data_root: str | None = None) -> Path:
    """The folder of ILSVRC 2012's class folders (n01440764, ...) of one split.

    Raises:
        UserError: not found; the message says what to put where.
    """
    official = {"train": "ILSVRC2012_train", "validation": "ILSVRC2012_validation"}[split]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoencoders" / "data"
    root = Path(data_root).expanduser() if data_root else data_dir() / "imagenet"
    short = "train" if split == "train" else "val"
    places = [root / short, root / official / "data", root / official, root]
    if not data_root:
        places.append(cache / official / "data")
    for place in places:
        if place.is_dir() and any(_is_synset(p.name) for p in os.scandir(place) if p.is_dir()):
            return place
    raise UserError(
        f"ImageNet ({split}) is not in {root / short}{'' if data_root else f' nor {cache / official}'}: get "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (free registration), unpack "
        f"them to {root / short}/<synset>/*.JPEG (1,000 folders such as n01440764), or set data_root; "
        "for your own pictures: data.params.root=FOLDER"
    )


def _is_synset(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def imagenet_entries(place: Path, config: Mapping[str, Any]) -> tuple[Folder, Entries]:
    """All images of a split, or the classes that `sub_indices` ("0-9, 42") names."""
    source = Folder(place)
    entries, _ = find_entries(source, captions="none", labels="folder")
    keep = np.array([not n.endswith(BROKEN.rpartition("/")[2]) for n in entries.names])
    if config.get("sub_indices"):
        chosen = parse_indices(str(config["sub_indices"]), len(entries.class_names))
        keep &= np.isin(entries.labels, chosen)
    entries = entries.take(np.flatnonzero(keep))
    if config.get("sub_indices") and not config.get("keep_orig_class_label"):
        entries.labels = np.searchsorted(chosen, entries.labels)
        entries.class_names = [entries.class_names[c] for c in chosen]
    return source, entries


def parse_indices(text: str, count: int) -> list[int]:
    """`"0-9, 42"` -> [0, ..., 9, 42].

    Raises:
        UserError: no numbers, or beyond `count`.
    """
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or not (high or low).isdigit():
            raise UserError(f"sub_indices must look like 0-9, 42, got {text!r}")
        found.update(range(int(low), int(high or low) + 1))
    if max(found) >= count:
        raise UserError(f"sub_indices names class {max(found)}, but there are {count}")
    return sorted(found)


def human_labels(place: Path, synsets: list[str]) -> list[str]:
    """Words for synsets, from synset_human.txt or LOC_synset_mapping.txt beside the images; else the synsets."""
    for folder in (place, place.parent, place.parent.parent):
        for name in ("synset_human.txt", "LOC_synset_mapping.txt"):
            if (folder / name).is_file():
                lines = (folder / name).read_text(encoding="utf-8").splitlines()
                words = {s: w.strip() for s, _, w in (line.partition(" ") for line in lines)}
                return [words.get(s, s) for s in synsets]
    return synsets


class ImageNetBase(FileImages):
    """ILSVRC 2012 with the official batch keys.

    Batches hold `image` float32 [B, size, size, channels] in [-1, 1], `class_label` int64 [B] (sorted synsets),
    `synsets`, `human_label`, `relpath` and `file_path_`.

    Args:
        config: `size` (0 or absent: the images' own), `data_root`, `sub_indices` ("0-9, 42"), `keep_orig_class_label`,
            and `ImageNetTrain: {random_crop: true}` or `ImageNetValidation: {random_crop: false}`.
        channels: 1 or 3.
    """

    split = "train"

    def __init__(self, config: Mapping[str, Any] | None = None, channels: int = 3) -> None:
        config = dict(config or {})
        unknown = sorted(set(config) - set(CONFIG_KEYS))
        if unknown:
            raise UserError(f"unknown key config.{unknown[0]}: {type(self).__name__} takes {', '.join(CONFIG_KEYS)}")
        train = self.split == "train"
        own = config.get("ImageNetTrain" if train else "ImageNetValidation") or {}
        place = find_imagenet(self.split, config.get("data_root"))
        source, entries = imagenet_entries(place, config)
        self.human = human_labels(place, entries.class_names)
        fit = Fit(parse_size(config.get("size")), check_channels(channels), random=bool(own.get("random_crop", train)))
        super().__init__(source, entries, fit)

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        fields = super().fields(indices, draws)
        names = fields["relpath"]
        fields["synsets"] = [n.partition("/")[0] for n in names]
        fields["human_label"] = [self.human[c] for c in self.entries.labels[indices]]
        fields["file_path_"] = [self.source.where(n) for n in names]
        return fields


class ImageNetTrain(ImageNetBase):
    split = "train"


class ImageNetValidation(ImageNetBase):
    split = "validation"


# --- super-resolution -------------------------------------------------------------------------------------------------


class SuperResolution(FileImages):
    """Pairs of an image and its degraded small version.

    A square of a random share of the shorter side is cut, scaled to `size`, and degraded to `size / downscale_f`.
    Batches hold `image` float32 [B, size, size, C] and `LR_image` float32 [B, size/f, size/f, C], both in [-1, 1], and
    `class_label`, `relpath`, `caption` (the class).

    Args:
        source, entries: the pictures.
        size: pixels of the large image.
        degradation: bsrgan, bsrgan_light, cv_{nearest, bilinear, bicubic, area, lanczos} or
            pil_{nearest, bilinear, bicubic, box, hamming, lanczos}.
        downscale_f: how much smaller the low-resolution image is.
        min_crop_f, max_crop_f: range of the cut's share of the shorter side.
        random_crop: cut at a random place, else in the centre.
        channels: 1 or 3.
    """

    float_keys = ("image", "LR_image")
    cacheable = False

    def __init__(
        self,
        source: Source,
        entries: Entries,
        size: int,
        degradation: str | None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        channels: int = 3,
    ) -> None:
        if degradation not in DEGRADATIONS:
            raise UserError(f"degradation must be one of {', '.join(DEGRADATIONS)}, got {degradation!r}")
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise UserError(f"expected 0 < min_crop_f <= max_crop_f <= 1, got {min_crop_f} and {max_crop_f}")
        if parse_size(size) is None or size % downscale_f:
            raise UserError(f"size must be a multiple of downscale_f = {downscale_f}, got {size!r}")
        super().__init__(source, entries, Fit(None, check_channels(channels)))
        self.size = (size, size)
        self.degradation, self.factor, self.random_crop = degradation, downscale_f, random_crop
        self.crop_range = (min_crop_f, max_crop_f)

    def sample(self, index: int, draws: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        edge, (low, high) = self.size[0], self.crop_range
        needed = int(np.ceil(edge / low))
        image = open_image(self.read(index), self.channels, (needed, needed))
        side = max(1, int(min(image.size) * (low + draws[SCALE] * (high - low))))
        y, x = (draws[CROP_Y], draws[CROP_X]) if self.random_crop else (0.5, 0.5)
        top, left = int(y * (image.height - side + 1)), int(x * (image.width - side + 1))
        method = Image.Resampling.BOX if side >= edge else Image.Resampling.BICUBIC
        large = as_array(image.resize((edge, edge), method, box=(left, top, left + side, top + side)))
        rng = np.random.default_rng((stream, index))
        return {"image": large, "LR_image": degrade(large, self.degradation, self.factor, rng)}

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        words = [self.entries.class_names[c] for c in self.entries.labels[indices]]
        return {**super().fields(indices, draws), "caption": words, "human_label": words}


class ImageNetSR(SuperResolution):
    """Super-resolution pairs from ImageNet, or from your own pictures if `root` is given.

    Args:
        size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop, channels: see SuperResolution.
        data_root: folder of ImageNet's train/ and val/.
        root: a folder or zip of your own pictures instead.
        hr_indices: text file with the numbers (by sorted path) of the images that are large enough, one a line; default
            `imagenet_{train,val}_hr_indices.txt` in the data folder, if it is there. Without it, all images.
    """

    split = "train"

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        channels: int = 3,
        data_root: str | None = None,
        root: str | None = None,
        hr_indices: str | None = None,
    ) -> None:
        if size is None:
            raise UserError(f"{type(self).__name__} needs size, the pixels of the large image")
        source, entries = self._own(root) if root else self._imagenet(data_root, hr_indices)
        super().__init__(source, entries, size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop, channels)

    def _own(self, root: str) -> tuple[Source, Entries]:
        source = open_source(root)
        return source, choose_split(*find_entries(source, captions="none"), self.split)

    def _imagenet(self, data_root: str | None, hr_indices: str | None) -> tuple[Source, Entries]:
        place = find_imagenet(self.split, data_root)
        source, entries = imagenet_entries(place, {})
        short = "train" if self.split == "train" else "val"
        file = Path(hr_indices) if hr_indices else data_dir() / f"imagenet_{short}_hr_indices.txt"
        if hr_indices or file.is_file():
            try:
                entries = entries.take(np.loadtxt(file, dtype=np.int64, ndmin=1))
            except (OSError, ValueError, IndexError) as e:
                raise UserError(f"{file} must hold image numbers below {len(entries.names)}, one a line: {e}") from e
        else:
            log.info("no %s: all %d images serve as high-resolution images", file, len(entries.names))
        entries.class_names = human_labels(place, entries.class_names)
        return source, entries


class ImageNetSRTrain(ImageNetSR):
    split = "train"


class ImageNetSRValidation(ImageNetSR):
    split = "validation"


class SuperresOpenImagesAdvancedTrain(SuperResolution):
    """Super-resolution pairs from OpenImages (never released; see FileList for what to put where).

    Args:
        size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop, channels: see SuperResolution.
        paths, data_root: see FileList.
        root: a folder or zip of your own pictures instead.
    """

    split = "train"

    def __init__(
        self,
        size: int,
        degradation: str,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        channels: int = 3,
        paths: str | None = None,
        data_root: str | None = None,
        root: str | None = None,
    ) -> None:
        if root:
            source: Source = open_source(root)
            entries = choose_split(*find_entries(source, captions="none"), self.split)
        else:
            own = FullOpenImagesTrain
            source, entries = locate(type(self).__name__, self.split, paths, data_root, own.lists, own.folder)
        super().__init__(source, entries, size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop, channels)


class SuperresOpenImagesAdvancedValidation(SuperresOpenImagesAdvancedTrain):
    split = "validation"
