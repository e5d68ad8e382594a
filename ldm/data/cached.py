"""Latents of a data set's pictures, encoded once and kept on disk: training then reads no pictures at all.

One row of `latents.npy` for each (picture, mirrored or not); every other augmentation would need rows without end.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.base import ALTERNATE, FLIP, ImageDataset, in_turn, to_float, uniforms
from ldm.util import UserError

log = logging.getLogger(__name__)

KEY = "latents"  # of the batch: what `encode` gave, float32 [B, c, h, w]
PROBES = 16  # pictures that stand for all when a cache is recognised
Encode = Callable[[Tensor], Tensor]  # pictures [B, H, W, C] in [-1, 1] -> float32 [B, c, h, w]


class CachedLatents(Dataset):
    """An ImageDataset whose batches hold `latents` in the place of pictures, and everything else as before.

    Args:
        dataset: where labels, captions and the draws of flips come from.
        folder: with `latents.npy` [N * variants, c, h, w] and `served.npy` [N], from `fill`.
    """

    in_memory = True  # as good as: rows are read from a memory map, no worker would be faster

    def __init__(self, dataset: ImageDataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self.class_names, self.num_classes = dataset.class_names, dataset.num_classes
        self.size, self.channels = dataset.size, dataset.channels
        self.variants = variants(dataset)
        self.served = np.load(folder / "served.npy")
        self._table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # each worker opens the file for itself

    @property
    def table(self) -> np.ndarray:
        """The file, mapped into memory."""
        if self._table is None:
            self._table = np.load(self.folder / "latents.npy", mmap_mode="r")
        return self._table

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        """The batch that the data set would give, pictures encoded; `stream` as there."""
        wanted = np.asarray(indices, np.int64)
        draws = uniforms(stream, wanted)
        mirrored = self._mirrored(stream, wanted, draws) if len(self.variants) == 2 else 0
        rows = wanted * len(self.variants) + mirrored
        return {KEY: torch.from_numpy(self.table[rows]), **self.dataset.fields(self.served[wanted], draws)}

    def _mirrored(self, stream: int, indices: np.ndarray, draws: np.ndarray) -> np.ndarray:
        p = self.dataset.flip_p
        return (in_turn(stream, indices) if p == ALTERNATE else draws[:, FLIP] < p).astype(np.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v[0] for k, v in self.get_batch([index % len(self)]).items()}


def variants(dataset: ImageDataset) -> tuple[bool, ...]:
    """Which of (as it is, mirrored) the data set hands out."""
    return {0: (False,), 1: (True,)}.get(dataset.flip_p, (False, True))


def cache(
    dataset: Any,
    directory: str | Path,
    split: str,
    encode: Encode,
    identity: str,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> CachedLatents:
    """The data set with latents from `directory`, where those that are not there yet are made.

    Args:
        dataset: an ImageDataset.
        directory: holds one folder for each (data, first stage); interrupted work goes on where it stopped.
        split: for messages.
        encode: the first stage.
        identity: of the first stage's weights: another one gets another folder.
        batch_size: pictures encoded at once.
        rank, world, barrier: each process encodes its share and waits for the others.

    Raises:
        UserError: the data set's pictures differ from epoch to epoch by more than a flip, or the disk is full.
    """
    check_repeatable(dataset, split)
    folder = Path(directory) / f"{split}-{fingerprint(dataset, identity)}"
    if rank == 0:
        _create(dataset, folder, encode, split)
    barrier()
    fill(dataset, folder, encode, batch_size, rank, world)
    barrier()
    return CachedLatents(dataset, folder)


def check_repeatable(dataset: Any, split: str) -> None:
    """Raises UserError for a data set whose pictures are not the same each time, flips aside."""
    if not isinstance(dataset, ImageDataset):
        raise UserError(
            f"cache_latents: data.params.{split} is a {type(dataset).__name__}, expected one of this project's image "
            "data sets (ImageFolder, ...): of others it is not known which augmentation they draw"
        )
    why = None
    if dataset.pad_crop:
        why = f"is shifted at random (pad_crop: {dataset.pad_crop})"
    elif getattr(getattr(dataset, "fit", None), "random", False):
        why = "is cut at a random place (random_crop: true)"
    else:
        why = _differs(dataset)
    if why:
        raise UserError(
            f"cache_latents: each picture of data.params.{split} ({type(dataset).__name__}) {why}; latents are kept "
            "once for each picture (and its mirror image): turn that off, or leave cache_latents out"
        )


def _differs(dataset: ImageDataset) -> str | None:
    probes = _probes(dataset)
    first, second = (dataset.arrays(probes, stream, uniforms(stream, probes))[0] for stream in (1, 2))
    if others := set(first) - {"image"}:
        return f"comes with a second map, {min(others)}"
    return None if torch.equal(first["image"], second["image"]) else "is drawn anew each time"


def _probes(dataset: ImageDataset) -> np.ndarray:
    return np.unique(np.linspace(0, len(dataset) - 1, PROBES).astype(np.int64))


def fingerprint(dataset: ImageDataset, identity: str) -> str:
    """Sixteen digits that change with the first stage, the files, their order, number, length, size and cut."""
    probes = _probes(dataset)
    pictures, _ = dataset.arrays(probes, 0, uniforms(0, probes))
    names = getattr(getattr(dataset, "entries", None), "names", [])
    sha = hashlib.sha256(repr((identity, len(dataset), dataset.size, variants(dataset), list(names))).encode())
    sha.update(repr(file_sizes(dataset)).encode())
    sha.update(pictures["image"].numpy().tobytes())
    return sha.hexdigest()[:16]


def file_sizes(dataset: ImageDataset) -> list[int]:
    """Bytes of each picture file (or of the zip): a picture that was edited nearly always has another length.

    Unlike times of change, lengths stay when the folder is copied to another disk.
    """
    source, entries = getattr(dataset, "source", None), getattr(dataset, "entries", None)
    if source is None or entries is None:
        return []
    paths = [source.path] if hasattr(source, "path") else [source.where(name) for name in entries.names]
    return [os.path.getsize(path) if os.path.isfile(path) else -1 for path in paths]


def _create(dataset: ImageDataset, folder: Path, encode: Encode, split: str) -> None:
    """Makes the files of a new cache at their full size, so that a full disk is met now."""
    done, kinds = folder / "done.npy", variants(dataset)
    if done.is_file():
        return
    shape = (len(dataset) * len(kinds), *_encoded(dataset, np.zeros(1, np.int64), encode)[0].shape[1:])
    size = 4 * int(np.prod(shape))
    log.info("cache_latents: %d pictures of %s, %.2f GB in %s", len(dataset), split, size / 1e9, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            with open(folder / "latents.npy", "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, table.offset + size)
        np.save(folder / "served.npy", np.arange(len(dataset)))
        np.save(done, np.zeros(len(dataset), np.uint8))  # last: a cache with this file is whole
    except OSError as e:
        raise UserError(f"cache_latents: {folder} cannot hold {size / 1e9:.2f} GB ({e.strerror or e})") from e


def fill(dataset: ImageDataset, folder: Path, encode: Encode, batch_size: int, rank: int = 0, world: int = 1) -> None:
    """Encodes every world-th picture that is not done yet."""
    table, served, done = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("latents", "served", "done"))
    left = np.flatnonzero(done == 0)[rank::world]
    for number, at in enumerate(range(0, len(left), batch_size)):
        indices, n = left[at : at + batch_size], len(variants(dataset))
        latents, replaced = _encoded(dataset, indices, encode)
        table.reshape(len(done), n, *table.shape[1:])[indices] = latents.unflatten(0, (len(indices), n)).numpy()
        served[indices] = replaced
        table.flush()
        done[indices] = 1
        if number % 100 == 99:
            log.info("cache_latents: %d of %d pictures", at + len(indices), len(left))
    done.flush()
    served.flush()


def _encoded(dataset: ImageDataset, indices: np.ndarray, encode: Encode) -> tuple[Tensor, np.ndarray]:
    """Rows [B * variants, c, h, w] of these pictures, and which pictures they really are."""
    arrays, served = dataset.arrays(indices, 0, uniforms(0, indices))
    pictures = to_float(arrays["image"])
    both = torch.stack([pictures.flip(2) if mirrored else pictures for mirrored in variants(dataset)], dim=1)
    return encode(both.flatten(0, 1)).float().cpu(), served
