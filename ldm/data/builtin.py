"""Data that needs no download."""

from __future__ import annotations

import numpy as np
import torch

from ldm.data.base import ArrayDataset, Size, check_channels, parse_size, resize_arrays, stratified_split
from ldm.data.openmoji import OpenMoji
from ldm.util import UserError

__all__ = ["Digits", "OpenMoji"]

SHARES = {"test": 360 / 1797, "validation": 180 / 1797, "train": 1257 / 1797}


class Digits(ArrayDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 (UCI Optical Recognition of Handwritten Digits).

    Batches hold `image` float32 [B, size, size, channels] in [-1, 1] (ink is light) and `class_label` int64 [B].

    Args:
        split: train (1,257 images), validation (180), test (360), or all. Stratified; fixed by `seed`.
        size: pixels, or [height, width]; the 8x8 originals are upscaled by a bicubic filter.
        channels: 1 or 3.
        flip_p: probability of a left-right flip (0: mirrored digits are no digits).
        pad_crop: random shift by up to so many pixels.
        seed: of the split.
    """

    def __init__(
        self,
        split: str = "train",
        size: Size = 16,
        channels: int = 1,
        flip_p: float | str = 0.0,
        pad_crop: int = 0,
        seed: int = 0,
    ) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        labels = data.target.astype(np.int64)
        parts = {**stratified_split(labels, SHARES, seed), "all": np.arange(len(labels))}
        if split not in parts:
            raise UserError(f"split must be one of {', '.join(sorted(parts))}, got {split!r}")
        images = resize_arrays(data.images.astype(np.float32), parse_size(size), check_channels(channels), top=16.0)
        chosen = parts[split]
        names = [str(d) for d in range(10)]
        super().__init__(images[torch.from_numpy(chosen)], labels[chosen], names, flip_p, pad_crop)
