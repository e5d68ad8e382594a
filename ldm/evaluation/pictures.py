"""Sets of pictures to measure: a split of a run's data as its loader gives it, drawn pictures, any folder."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.base import ImageDataset, Size
from ldm.data.builtin import Digits
from ldm.data.cached import CachedLatents
from ldm.data.entries import Entries
from ldm.data.image import FileImages, ImageFolder
from ldm.data.openmoji import OpenMoji
from ldm.data.pixels import Fit
from ldm.data.sampler import collate
from ldm.data.sources import Folder
from ldm.util import UserError, instantiate_from_config

# parameters of data sets that draw random numbers -> without
STILL = {"flip_p": 0.0, "pad_crop": 0, "random_crop": False}
DIGITS = 8  # side of scikit-learn's scans
LOSSY = (".jpg", ".jpeg", ".webp")


class Pictures:
    """A data set as uint8 batches, in its own order.

    Args:
        dataset: any map-style data set whose samples hold the pictures [H, W, C] in [-1, 1] under `key`.
        about: what a result says of the set.
        key: of the pictures.
        label_key: of their classes.
    """

    def __init__(self, dataset: Any, about: dict[str, Any], key: str = "image", label_key: str = "class_label") -> None:
        self.dataset, self.key, self.label_key = dataset, key, label_key
        self.about = {**about, "n": len(dataset)}
        self.notes: list[str] = []
        self.class_names: list[str] | None = getattr(dataset, "class_names", None)
        first = self.raw([0])
        if not isinstance(first.get(key), Tensor) or first[key].ndim != 4:
            raise UserError(f"{about}: samples hold {sorted(first)}, expected pictures [H, W, C] under {key!r}")
        _, *size, channels = first[key].shape
        self.size, self.channels = tuple(size), channels
        self.about |= {"size": list(size), "channels": channels}
        self.has_labels = label_key in first
        self._sha256: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def raw(self, indices: Sequence[int]) -> dict[str, Any]:
        """The data set's own batch, pictures [B, H, W, C] in [-1, 1]."""
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.get_batch(indices)
        return collate([self.dataset[i] for i in indices])

    def get(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        x = torch.as_tensor(self.raw(indices)[self.key])
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 3, 1, 2)

    def name(self, i: int) -> str:
        """File of picture i, or its number where the set is not one of files."""
        return self.dataset.entries.names[i] if isinstance(self.dataset, FileImages) else str(i)

    def batches(self, size: int = 256, start: int = 0) -> Iterator[Tensor]:
        """uint8 [B, C, H, W], from picture `start` on; the next batch is read while one is in use."""
        parts = [range(at, min(at + size, len(self))) for at in range(start, len(self), size)]
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.get, part) for part in parts[:1]]
            for i in range(len(parts)):
                batch = ahead.pop().result()
                ahead += [pool.submit(self.get, part) for part in parts[i + 1 : i + 2]]
                yield batch

    def labels(self) -> np.ndarray | None:
        """int64 [N], or None where there are no classes."""
        if not self.has_labels:
            return None
        known = getattr(self.dataset, "labels", None)
        if known is None and isinstance(self.dataset, FileImages):
            known = self.dataset.entries.labels
        if known is not None:
            return np.asarray(known, np.int64)
        return np.concatenate([np.asarray(self.raw([i])[self.label_key]) for i in range(len(self))])

    def sha256(self) -> str:
        """Of all pixels (or of all files, and how they are read), in order: what tells this set from any other."""
        if self._sha256 is None:
            sha = hashlib.sha256(str((len(self), self.size, self.channels)).encode())
            if isinstance(self.dataset, FileImages):
                sha.update(str(self.dataset.fit).encode())
                for i in range(len(self)):  # a second decoding would take longer than all else
                    sha.update(hashlib.sha256(self.dataset.read(i)).digest())
            else:
                for batch in self.batches():
                    sha.update(batch.contiguous().numpy())
            self._sha256 = self.about["sha256"] = sha.hexdigest()
        return self._sha256


def of_config(config: Mapping[str, Any], split: str, key: str = "image") -> Pictures:
    """A split of a config's data (train, validation, test), its random augmentations off.

    Raises:
        UserError: the config has no data, or no such split.
    """
    data = config.get("data") or {}
    splits = {k: v for k, v in (data.get("params") or {}).items() if k in ("train", "validation", "test") and v}
    if split not in splits:
        raise UserError(f"--split {split}: the config's data has {', '.join(splits) or 'no data set'}")
    own = dict(splits[split])
    own["params"] = {k: STILL.get(k, v) for k, v in (own.get("params") or {}).items()}
    module = instantiate_from_config({**data, "params": {**data["params"], split: own}})
    module.prepare_data()
    module.setup({"train": "fit", "validation": "validate", "test": "test"}[split])
    if split not in module.datasets:
        raise UserError(f"--split {split}: the data has none")
    dataset = module.datasets[split]
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(f"--split {split}: {type(dataset).__name__} is a stream; figures need a set of a known size")
    return of_dataset(dataset, {"split": split}, key)


def of_dataset(dataset: Any, about: dict[str, Any], key: str = "image") -> Pictures:
    """A data set as it is, but for its random augmentations: the pictures behind cached latents, too."""
    if isinstance(dataset, CachedLatents):
        dataset = dataset.dataset
    if isinstance(dataset, ImageDataset):
        dataset = copy.copy(dataset)
        dataset.flip_p, dataset.pad_crop = 0.0, 0
    fit = getattr(dataset, "fit", None)
    if isinstance(fit, Fit):
        dataset.fit = fit = replace(fit, random=False)
    about = {"data": f"{type(dataset).__module__}.{type(dataset).__name__}", **about}
    pictures = Pictures(dataset, about, key)
    pictures.about["resize"] = resize_of(dataset, pictures.size)
    return pictures


def resize_of(dataset: Any, size: tuple[int, int]) -> str:
    """How the pictures came to this (height, width): the filter and the size before, or none."""
    fit = getattr(dataset, "fit", None)
    if isinstance(fit, Fit):
        return f"{fit.interpolation}, {fit.mode}" if fit.size or fit.resize_to else "none"
    if isinstance(dataset, OpenMoji):  # drawn as vectors; only the sides of what is not square are brought to it
        square = "none: drawn at this size"
        return square if size[0] == size[1] else f"bicubic from {max(size)}x{max(size)}"
    native = DIGITS if isinstance(dataset, Digits) else getattr(dataset, "native_size", None)
    if native is None:
        return f"as {type(dataset).__name__} does"
    return "none" if size == (native, native) else f"bicubic, antialiased, from {native}x{native}"


def of_folder(root: str | Path, size: Size, channels: int) -> Pictures:
    """All pictures of a folder or zip, brought to this size by the loader of folders."""
    dataset = ImageFolder(root, "all", list(size), channels, captions="none", cache=False, verify=0)
    pictures = Pictures(dataset, {"folder": str(root), "resize": f"{dataset.fit.interpolation}, {dataset.fit.mode}"})
    lossy = sum(n.lower().endswith(LOSSY) for n in dataset.entries.names)
    if lossy:
        pictures.notes.append(
            f"{lossy} of {len(dataset)} files in {root} are JPEG or WebP: their artefacts move FID and KID; use PNG"
        )
    return pictures


def of_files(
    folder: Path, names: Sequence[str], labels: np.ndarray, channels: int, size: tuple[int, int] | None = None
) -> Pictures:
    """Drawn pictures: PNG files of one size, in this order, brought to `size` (None = their own)."""
    from PIL import Image

    with Image.open(folder / names[0]) as first:
        own = (first.height, first.width)
    size = size or own
    entries = Entries(list(names), np.asarray(labels, np.int64), [str(c) for c in range(int(max(labels)) + 1)])
    dataset = FileImages(Folder(folder, names), entries, Fit(size, channels), cache=False, verify=0)
    resize = "none" if size == own else f"{dataset.fit.interpolation}, {dataset.fit.mode}, from {own[0]}x{own[1]}"
    return Pictures(dataset, {"folder": str(folder), "resize": resize})
