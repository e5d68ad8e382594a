"""Your own pictures: a folder, a zip, or a list of files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.base import CAPTION, CROP_X, CROP_Y, ImageDataset, Size, check_channels, parse_size
from ldm.data.entries import Entries, check_label_range, choose_split, find_entries
from ldm.data.pixels import UNREADABLE, Fit
from ldm.data.sources import Source, open_source
from ldm.util import UserError, words_of

log = logging.getLogger(__name__)

CHUNK = 256  # files that one decoding task takes
ATTEMPTS = 20  # other files tried in place of a broken one
NAMED = 10  # files that broke since the start and are named


class FileImages(ImageDataset):
    """Pictures in files, decoded once into memory where they fit, else when they are asked for.

    Before training, every file is decoded (or, where they do not fit into memory, `verify` of them, evenly spread).
    Unreadable ones are listed and left out. A file that breaks later is replaced by another, with one warning.

    Args:
        source: where the files lie.
        entries: their names, labels and captions.
        fit: size, channels and cut.
        flip_p: probability of a left-right flip; or `alternate`: each image in every other epoch.
        pad_crop: random shift by up to so many pixels, black outside.
        cache: auto (if the decoded pictures take less than `cache_gb`), true or false.
        cache_gb: limit of `auto`, in GB.
        max_unreadable: share of unreadable files above which it stops.
        verify: number of files that are decoded as a test when they are not all kept in memory.

    Raises:
        UserError: more unreadable files than that.
    """

    def __init__(
        self,
        source: Source,
        entries: Entries,
        fit: Fit,
        flip_p: float | str = 0.0,
        pad_crop: int = 0,
        cache: str | bool = "auto",
        cache_gb: float = 2.0,
        max_unreadable: float = 0.05,
        verify: int = 1000,
    ) -> None:
        super().__init__(fit.size, fit.channels, flip_p, pad_crop)
        self.source, self.entries, self.fit = source, entries, fit
        self.class_names, self.empty_classes = entries.class_names, entries.empty
        self._ready: Tensor | list[np.ndarray] | None = None
        self._warned: set[int] = set()
        if cache not in ("auto", True, False):
            raise UserError(f"cache must be auto, true or false, got {cache!r}")
        keep = self._fits_memory(cache_gb) if cache == "auto" else bool(cache) and self.cacheable
        count = len(entries.names)
        tested = np.arange(count) if keep else np.unique(np.linspace(0, count - 1, min(verify, count)).astype(np.int64))
        self._leave_out(self._decode(tested, keep), len(tested), max_unreadable)

    @property
    def cacheable(self) -> bool:
        """Whether the decoded pictures may be kept; subclasses whose crops vary in scale say no."""
        return self.size is not None

    @property
    def in_memory(self) -> bool:
        return self._ready is not None

    def _fits_memory(self, gigabytes: float) -> bool:
        if not self.cacheable or self.size is None:
            return False
        h, w = self.fit.resize_to or self.size
        slack = 1.0 if self.fit.fixed_shape else 1.5  # a longer side that waits to be cut
        return len(self.entries.names) * h * w * self.channels * slack <= gigabytes * 1e9

    # -- before training --

    def _decode(self, positions: np.ndarray, keep: bool) -> list[tuple[int, str]]:
        """Decodes the files in threads (the decoders release the interpreter lock); gives the unreadable ones."""
        stacked = keep and self.fit.fixed_shape
        if keep:
            log.info("decoding %d images into memory", len(positions))
            shape = (len(positions), *(self.size or ()), self.channels)
            self._ready = torch.empty(shape, dtype=torch.uint8) if stacked else [np.empty(0)] * len(positions)
        into = self._ready.numpy() if isinstance(self._ready, Tensor) else self._ready
        parts = [positions[at : at + CHUNK] for at in range(0, len(positions), CHUNK)]
        with ThreadPoolExecutor(max_workers=min(8, available_cpus())) as pool:
            return [bad for found in pool.map(lambda p: self._decode_part(p, into), parts) for bad in found]

    def _decode_part(self, positions: np.ndarray, into: Any) -> list[tuple[int, str]]:
        bad = []
        for i in positions:
            try:
                array = self.fit.scaled(self.source.read(self.entries.names[i]))
                if into is not None:
                    into[i] = self.fit.cut(array) if self.fit.fixed_shape else array
            except UNREADABLE as e:
                bad.append((int(i), str(e) or type(e).__name__))
        return bad

    def _leave_out(self, bad: list[tuple[int, str]], tested: int, allowed: float) -> None:
        if not bad:
            return
        lines = [f"  {self.source.where(self.entries.names[i])}: {why.splitlines()[0]}" for i, why in bad[:10]]
        if len(bad) > len(lines):
            lines.append(f"  and {len(bad) - len(lines)} more")
        summary = f"{len(bad)} of {tested} images cannot be read"
        if len(bad) > allowed * tested:
            raise UserError(
                f"{summary}, more than the allowed share of {allowed:g} (max_unreadable):\n" + "\n".join(lines)
            )
        log.warning("%s and are left out:\n%s", summary, "\n".join(lines))
        good = np.setdiff1d(np.arange(len(self.entries.names)), [i for i, _ in bad])
        self.entries = self.entries.take(good)
        if isinstance(self._ready, Tensor):
            self._ready = self._ready[torch.from_numpy(good)]
        elif self._ready is not None:
            self._ready = [self._ready[i] for i in good]

    # -- while training --

    def __len__(self) -> int:
        return len(self.entries.names)

    def arrays(self, indices: np.ndarray, stream: int, draws: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        if isinstance(self._ready, Tensor):
            return {"image": self._ready[torch.from_numpy(indices)]}, indices
        served, samples = indices.copy(), []
        for j, i in enumerate(indices):
            served[j], sample = self._serve(int(i), draws[j], stream)
            samples.append(sample)
        return {key: _stack([s[key] for s in samples]) for key in samples[0]}, served

    def sample(self, index: int, draws: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        """The uint8 arrays [H, W, C] of one picture."""
        array = self._ready[index] if self._ready is not None else self.fit.scaled(self.read(index))
        return {"image": self.fit.cut(array, draws[CROP_Y], draws[CROP_X])}

    def read(self, index: int) -> bytes:
        """The file of one picture."""
        return self.source.read(self.entries.names[index])

    def _serve(self, index: int, draws: np.ndarray, stream: int) -> tuple[int, dict[str, np.ndarray]]:
        """The picture, or, if its file has broken since the start, the next readable one."""
        why = ""
        for attempt in range(ATTEMPTS):
            i = (index + attempt) % len(self)
            try:
                return i, self.sample(i, draws, stream)
            except UNREADABLE as e:
                why = f"{self.source.where(self.entries.names[i])} cannot be read any more ({e})"
                if i not in self._warned:
                    self._warned.add(i)
                    if len(self._warned) <= NAMED:
                        more = "; more such files are not named" if len(self._warned) == NAMED else ""
                        log.warning("%s; another image takes its place%s", why, more)
        raise UserError(f"{why}, nor can the {ATTEMPTS - 1} files after it: is the disk still there?")

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        return {
            "class_label": torch.from_numpy(self.entries.labels[indices]),
            "relpath": [self.entries.names[i] for i in indices],
        }


def _stack(arrays: list[np.ndarray]) -> Tensor:
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise UserError(f"images of different sizes {sorted(shapes)[:3]} cannot be one batch: set size")
    return torch.from_numpy(np.stack(arrays))


def pick(texts: Sequence[str], u: float) -> str:
    """One of several captions, by a random number in [0, 1)."""
    return texts[int(u * len(texts))]


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ImageFolder(FileImages):
    """A folder (or a .zip) of pictures: flat, in class sub-folders, or with captions.

    Labels come from class sub-folders (sorted) or the `label` column of metadata.jsonl / metadata.csv; a flat folder is
    one class. Captions come from the `text` or `caption` column, or from x.txt beside x.jpg; where there are none, the
    class name stands in (nothing, if there is one class only).

    Batches hold `image` float32 [B, H, W, C] in [-1, 1], `class_label` int64 [B], `caption` list[str], `relpath`.

    Args:
        root: the folder or zip.
        split: train, validation, test, or all. Sub-folders train/, val*/ and test/ are used if they exist; otherwise a
            fixed part of the pictures, chosen by a hash of their names, validates.
        size: pixels, or [height, width].
        channels: 1 or 3; grey, 16-bit, palette, CMYK and transparent pictures are all converted.
        random_crop: cut at a random place instead of the centre.
        flip_p: probability of a left-right flip; or `alternate`: each image in every other epoch.
        pad_crop: random shift by up to so many pixels, black outside.
        fit: crop (fill the size and cut), or pad (show all, with white bars).
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
        captions: auto, or none (no `caption` in the batch).
        labels: auto, folder (from sub-folders even if the metadata has labels), or none (all are one class).
        num_classes: if given, a label beyond it is an error.
        val_fraction: share that validates where there is no val*/ folder.
        split_by: hash, or last (the last of each class, by name).
        image_key, caption_key: names in the batch, for recipes that expect others (jpg, txt).
        cache, cache_gb, max_unreadable, verify: see FileImages.

    Raises:
        UserError: no such folder, no images, captions or metadata lines without a picture, too many unreadable files,
            a label out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "all",
        size: Size = 256,
        channels: int = 3,
        random_crop: bool = False,
        flip_p: float | str = 0.0,
        pad_crop: int = 0,
        fit: str = "crop",
        interpolation: str = "bicubic",
        captions: str = "auto",
        labels: str = "auto",
        num_classes: int | None = None,
        val_fraction: float = 0.1,
        split_by: str = "hash",
        image_key: str = "image",
        caption_key: str = "caption",
        cache: str | bool = "auto",
        cache_gb: float = 2.0,
        max_unreadable: float = 0.05,
        verify: int = 1000,
    ) -> None:
        source = open_source(root)
        found, parts = find_entries(source, captions, labels)
        check_label_range(found, num_classes, source.where)
        entries = choose_split(found, parts, split, val_fraction, split_by)
        self.wants_captions = captions != "none"
        self.image_key, self.caption_key = image_key, caption_key
        target = Fit(parse_size(size), check_channels(channels), fit, random_crop, interpolation)
        super().__init__(source, entries, target, flip_p, pad_crop, cache, cache_gb, max_unreadable, verify)

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        batch = super().get_batch(indices, stream)
        return {self.image_key: batch.pop("image"), **batch}

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        fields = super().fields(indices, draws)
        if self.wants_captions:
            fields[self.caption_key] = [self._caption(i, u) for i, u in zip(indices, draws[:, CAPTION], strict=True)]
        return fields

    @property
    def words(self) -> list[str] | None:
        """Every word of the captions, sorted; None where there are none."""
        if self.entries.captions is None:
            return None
        return sorted({w for texts in self.entries.captions for text in texts for w in words_of(text)})

    def _caption(self, index: int, u: float) -> str:
        if self.entries.captions is not None:
            return pick(self.entries.captions[index], u)
        names = self.entries.class_names
        return names[self.entries.labels[index]].replace("_", " ") if len(names) > 1 else ""
