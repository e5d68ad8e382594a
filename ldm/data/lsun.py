"""LSUN (Yu et al. 2015) by lists of files, with the official class names and defaults."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.data.base import Size
from ldm.data.filelist import FileList


class LSUNBase(FileList):
    """Square centre cut, resized, flipped at random.

    Batches hold `image` float32 [B, size, size, channels] in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        txt_file: list of paths below `data_root`, one a line; default `lsun/<name>.txt` in the data folder.
        data_root: folder of the images; default `lsun/<name>` in the data folder.
        size: pixels; None keeps the images' own size.
        interpolation: linear, bilinear, bicubic or lanczos.
        flip_p: probability of a left-right flip.
        channels: 1 or 3.
    """

    default_flip = 0.5

    def __init__(
        self,
        txt_file: str | None = None,
        data_root: str | None = None,
        size: Size | None = None,
        interpolation: str = "bicubic",
        flip_p: float | None = None,
        channels: int = 3,
    ) -> None:
        flip_p = self.default_flip if flip_p is None else flip_p
        super().__init__(txt_file, data_root, size, flip_p=flip_p, interpolation=interpolation, channels=channels)

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        fields = super().fields(indices, draws)
        return {**fields, "relative_file_path_": fields["relpath"]}


class LSUNChurchesTrain(LSUNBase):
    lists = {"train": "lsun/church_outdoor_train.txt", "validation": "lsun/church_outdoor_val.txt"}
    folder, split = "lsun/churches", "train"


class LSUNChurchesValidation(LSUNChurchesTrain):
    split, default_flip = "validation", 0.0


class LSUNBedroomsTrain(LSUNBase):
    lists = {"train": "lsun/bedrooms_train.txt", "validation": "lsun/bedrooms_val.txt"}
    folder, split = "lsun/bedrooms", "train"


class LSUNBedroomsValidation(LSUNBedroomsTrain):
    split, default_flip = "validation", 0.0


class LSUNCatsTrain(LSUNBase):
    lists = {"train": "lsun/cat_train.txt", "validation": "lsun/cat_val.txt"}
    folder, split = "lsun/cats", "train"


class LSUNCatsValidation(LSUNCatsTrain):
    split, default_flip = "validation", 0.0
