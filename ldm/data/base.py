"""What all data sets share: one random stream per image, batches served whole, float images in [-1, 1]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ldm.util import UserError

Size = int | Sequence[int]
# Columns of the random numbers that every image of a batch gets (see `uniforms`).
FLIP, SHIFT_Y, SHIFT_X, CROP_Y, CROP_X, CAPTION, SCALE, NOISE = range(8)
ALTERNATE = "alternate"  # flip_p: each image in every other epoch
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL


def data_dir() -> Path:
    """Where data sets are looked for and downloaded to: $LDM_DATA, else `data/` in the working directory."""
    return Path(os.environ.get("LDM_DATA") or "data")


def parse_size(size: Size | None) -> tuple[int, int] | None:
    """`256` or `[h, w]` -> (h, w); None or 0 (keep the image's own size) -> None.

    Raises:
        UserError: anything else.
    """
    if size is None or size == 0:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if isinstance(size, (str, bool)) or len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise UserError(f"size must be a number of pixels or [height, width], got {size!r}")
    return pair


def check_channels(channels: int) -> int:
    """1 (grey) or 3 (RGB)."""
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    return channels


# --- random numbers ---------------------------------------------------------------------------------------------------


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): uint64 -> well mixed uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_of(seed: int, epoch: int) -> int:
    """The name of the random stream of one epoch: equal for every worker, rank and restart.

    Its lowest bit is that of the epoch, for augmentations that take turns.
    """
    with np.errstate(over="ignore"):
        name = int(mix(mix(np.array([seed], np.int64).astype(np.uint64)) + np.uint64(epoch))[0])
    return name & ~1 | epoch & 1


def uniforms(stream: int, indices: np.ndarray, n: int = NOISE + 1) -> np.ndarray:
    """Random numbers [B, n] in [0, 1), a function of (stream, index) alone.

    A counter-based generator: no state, so that an image's augmentation does not depend on its batch, on the worker
    that decodes it, or on what was drawn before a restart.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.uint64(stream) + (indices.astype(np.uint64) + np.uint64(1)) * golden)
        bits = mix(key[:, None] + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * golden)
    return (bits >> np.uint64(11)) * 2.0**-53


# --- pixels -----------------------------------------------------------------------------------------------------------


def to_float(x: Tensor) -> Tensor:
    """uint8 [...] -> float32 [...] in [-1, 1]."""
    return x.to(torch.float32).div_(127.5).sub_(1.0)


def check_flip(p: float | str) -> float | str:
    """A probability, or `alternate`.

    Raises:
        UserError: anything else.
    """
    if p != ALTERNATE and (isinstance(p, (str, bool)) or not 0 <= p <= 1):
        raise UserError(f"flip_p must be a probability in [0, 1] or {ALTERNATE}, got {p!r}")
    return p


def in_turn(stream: int, indices: np.ndarray) -> np.ndarray:
    """bool [B]: mirrored in this epoch; in the next one the others are. A random half of the images begins.

    So that each image is seen both ways in every two epochs ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Jordan
    2024, section 3.6).
    """
    return (uniforms(0, indices, 1)[:, 0] < 0.5) ^ bool(stream & 1)


def flip(x: Tensor, draws: np.ndarray, p: float) -> Tensor:
    """[B, H, W, C], mirrored left-right where the image's draw is below p."""
    if p <= 0:
        return x
    chosen, x = torch.from_numpy(draws[:, FLIP] < p), x.clone()
    x[chosen] = x[chosen].flip(2)
    return x


def pad_and_crop(x: Tensor, draws: np.ndarray, pad: int) -> Tensor:
    """[B, H, W, C] shifted by up to `pad` pixels each way, black outside (the CIFAR augmentation)."""
    if pad <= 0:
        return x
    h, w = x.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, pad, pad, pad, pad)).numpy()
    top, left = ((draws[:, k] * (2 * pad + 1)).astype(np.int64).tolist() for k in (SHIFT_Y, SHIFT_X))
    # windows are copied as they lie in memory: ten times as fast as gathering their pixels
    return torch.from_numpy(np.stack([p[t : t + h, s : s + w] for p, t, s in zip(padded, top, left, strict=True)]))


def resize_arrays(images: np.ndarray, size: tuple[int, int] | None, channels: int, top: float = 255.0) -> Tensor:
    """Resizes a stack of equal-sized images (antialiased bicubic) and sets its channel count.

    Args:
        images: [N, H, W] or [N, H, W, C], values in [0, top].

    Returns:
        uint8 [N, h, w, channels].
    """
    x = torch.from_numpy(np.ascontiguousarray(images))
    x = x[..., None] if x.ndim == 3 else x
    out = torch.empty(len(x), *(size or x.shape[1:3]), channels, dtype=torch.uint8)
    for at in range(0, len(x), 1024):  # in parts: the float copy of a whole set would be four times its size
        part = x[at : at + 1024].permute(0, 3, 1, 2).float() * (255.0 / top)
        if channels < part.shape[1]:
            part = (part * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        if size is not None and part.shape[2:] != size:
            part = torch.nn.functional.interpolate(part, size=size, mode="bicubic", antialias=True)
        out[at : at + 1024] = part.round().clamp(0, 255).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, channels)
    return out


# --- splits -----------------------------------------------------------------------------------------------------------


def stratified_split(labels: np.ndarray, shares: Mapping[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Cuts 0..len-1 into named parts with the same class shares; the last part gets the rest. Sorted indices.

    Each part holds `round(share * len)` images; a class's count in it is off by less than one image.
    """
    left = [np.random.default_rng((seed, int(c))).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    sizes = np.array([len(members) for members in left])
    parts: dict[str, np.ndarray] = {}
    for name, share in list(shares.items())[:-1]:
        exact = share * sizes
        counts = np.floor(exact).astype(int)
        most_owed = np.argsort(counts - exact, kind="stable")
        counts[most_owed[: round(share * len(labels)) - counts.sum()]] += 1
        parts[name] = np.sort(np.concatenate([m[:k] for m, k in zip(left, counts, strict=True)]))
        left = [m[k:] for m, k in zip(left, counts, strict=True)]
    parts[list(shares)[-1]] = np.sort(np.concatenate(left))
    return parts


# --- data sets --------------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """A data set of images that hands out whole batches.

    Subclasses write `arrays(indices, stream, draws)` and `fields(indices, draws)`. A sample is a dict with `image`
    float32 [H, W, C] in [-1, 1] and whatever `fields` adds; `get_batch` gives the same with a leading axis [B, ...],
    labels int64 [B], strings as lists.

    Args:
        size: pixels, or [height, width]; None keeps the images' own size.
        channels: 1 or 3.
        flip_p: probability of a left-right flip; or `alternate`: each image is mirrored in every other epoch.
        pad_crop: random shift by up to so many pixels, black outside.
    """

    in_memory = False
    float_keys: tuple[str, ...] = ("image",)
    class_names: list[str] | None = None

    def __init__(self, size: Size | None, channels: int, flip_p: float | str = 0.0, pad_crop: int = 0) -> None:
        self.size, self.channels = parse_size(size), check_channels(channels)
        self.flip_p, self.pad_crop = check_flip(flip_p), pad_crop

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None where there are no labels."""
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must say how many images it has")

    def arrays(self, indices: np.ndarray, stream: int, draws: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        """uint8 [B, H, W, C] by key, and the indices really served (a broken file is replaced by another)."""
        raise NotImplementedError(f"{type(self).__name__} must read its images")

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        """Everything of the batch that is not an image."""
        return {}

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        """The samples of `indices` as one batch; `stream` (see `stream_of`) names the random numbers to use."""
        wanted = np.asarray(indices, np.int64)
        draws = uniforms(stream, wanted)
        arrays, served = self.arrays(wanted, stream, draws)
        p = self.flip_p
        if p == ALTERNATE:
            draws[:, FLIP], p = ~in_turn(stream, wanted), 0.5  # 0 where it is mirrored, else 1
        batch: dict[str, Any] = {}
        for key, x in arrays.items():
            x = pad_and_crop(flip(x, draws, p), draws, self.pad_crop)
            batch[key] = to_float(x) if key in self.float_keys else self.finish(key, x)
        return {**batch, **self.fields(served, draws)}

    def finish(self, key: str, x: Tensor) -> Tensor:
        """What becomes of an array that is no picture (segmentation maps)."""
        return x

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        return {k: v[0] for k, v in self.get_batch([index % len(self)]).items()}


class ArrayDataset(ImageDataset):
    """Images held decoded in memory.

    Args:
        images: uint8 [N, H, W, C].
        labels: [N], or None.
        class_names: one per label.
    """

    in_memory = True

    def __init__(
        self,
        images: Tensor,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        flip_p: float | str = 0.0,
        pad_crop: int = 0,
    ) -> None:
        super().__init__(tuple(images.shape[1:3]), images.shape[3], flip_p, pad_crop)
        self.images = images
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels, np.int64))
        self.class_names = None if class_names is None else list(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def arrays(self, indices: np.ndarray, stream: int, draws: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        return {"image": self.images[torch.from_numpy(indices)]}, indices

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        if self.labels is None:
            return {}
        return {"class_label": self.labels[torch.from_numpy(indices)]}


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Base of users' streaming text-to-image sets (official name and fields).

    A subclass writes `__iter__` over `self.sample_ids`; with several workers the data module gives each of them its
    own part of `valid_ids` there.

    Args:
        num_records: length of the stream.
        valid_ids: identifiers of the records.
        size: pixels.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records, self.valid_ids, self.size = num_records, valid_ids, size
        self.sample_ids = valid_ids

    def __len__(self) -> int:
        return self.num_records
