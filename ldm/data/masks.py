"""Random masks for inpainting models, beside the pictures of any image data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.base import Size
from ldm.util import UserError, accepted_params, get_obj_from_str, instantiate_from_config

KINDS = ("mixed", "strokes", "boxes", "all")


class RandomMasks(Dataset):
    """A data set whose batches also hold `mask` float32 [B, H, W, 1], 1 = to be made anew, and `masked_image`, the
    picture with 0 (grey) there: what Stable Diffusion's inpainting model is told.

    Args:
        dataset: `{target, params}` of one of this project's image data sets.
        kind: strokes (thick broken lines), boxes, all (the whole picture), or mixed: `full` of the pictures all, the
            others strokes and boxes, one, the other or both.
        full: share of `mixed` in which everything is masked; Stable Diffusion had 0.25.
        seed: draw the same masks in every epoch, for validation; None = new ones.
        image_key: where the data set keeps its pictures.
        root, size, channels: handed to the data set where it takes them and does not set them.

    Raises:
        UserError: unknown kind, or a data set of another kind.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        kind: str = "mixed",
        full: float = 0.25,
        seed: int | None = None,
        image_key: str = "image",
        root: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not 0 <= full <= 1:
            raise UserError(f"full must be a share between 0 and 1, got {full!r}")
        params = dict(dataset.get("params") or {})
        accepted = accepted_params(get_obj_from_str(dataset["target"])) or {}
        given = {"root": root, "size": size, "channels": channels}
        params |= {k: v for k, v in given.items() if v is not None and k in accepted and k not in params}
        self.dataset = instantiate_from_config({"target": dataset["target"], "params": params})
        if not hasattr(self.dataset, "get_batch"):
            raise UserError(f"RandomMasks: {dataset['target']} is none of this project's image data sets")
        self.kind, self.full, self.seed, self.image_key = kind, full, seed, image_key

    @property
    def in_memory(self) -> bool:
        """Whether the pictures are."""
        return self.dataset.in_memory

    @property
    def class_names(self) -> list[str] | None:
        """Those of the data set."""
        return self.dataset.class_names

    @property
    def num_classes(self) -> int | None:
        """That of the data set."""
        return self.dataset.num_classes

    @property
    def size(self) -> Size | None:
        """That of the data set."""
        return self.dataset.size

    @property
    def channels(self) -> int:
        """Those of the data set."""
        return self.dataset.channels

    def __len__(self) -> int:
        return len(self.dataset)

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        """The data set's batch with masks; `stream` as there."""
        batch = self.dataset.get_batch(indices, stream)
        pictures = batch[self.image_key]
        height, width = pictures.shape[1:3]
        source = stream if self.seed is None else self.seed
        drawn = [self.draw(height, width, np.random.default_rng((source, int(i)))) for i in indices]
        mask = torch.stack(drawn)
        return {**batch, "mask": mask, "masked_image": pictures * (mask < 0.5)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {k: v[0] for k, v in self.get_batch([index % len(self)]).items()}

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Tensor:
        """One mask, float32 [H, W, 1] of zeros and ones, neither empty nor (unless it is meant to be) full."""
        if self.kind == "all" or (self.kind == "mixed" and rng.random() < self.full):
            return torch.ones(height, width, 1)
        kinds = {"strokes": (strokes,), "boxes": (boxes,)}.get(self.kind, ((strokes,), (boxes,), (strokes, boxes)))
        chosen = kinds if self.kind != "mixed" else kinds[rng.integers(3)]
        page = Image.new("L", (width, height))
        for paint in chosen:
            paint(ImageDraw.Draw(page), height, width, rng)
        mask = np.asarray(page) > 0
        return torch.from_numpy(mask.astype(np.float32))[..., None]


def strokes(draw: ImageDraw.ImageDraw, height: int, width: int, rng: np.random.Generator) -> None:
    """One to four broken lines with round ends, an eighth to a quarter of the shorter side thick."""
    side = min(height, width)
    for _ in range(rng.integers(1, 5)):
        thick = max(1, int(side * rng.uniform(0.125, 0.25)))
        points = [(rng.uniform(0, width), rng.uniform(0, height))]
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(1, 6)):
            angle += rng.uniform(-np.pi / 2, np.pi / 2)
            step = side * rng.uniform(0.1, 0.5)
            x = np.clip(points[-1][0] + step * np.cos(angle), 0, width)
            y = np.clip(points[-1][1] + step * np.sin(angle), 0, height)
            points.append((float(x), float(y)))
        draw.line(points, fill=255, width=thick, joint="curve")
        for x, y in points:
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)


def boxes(draw: ImageDraw.ImageDraw, height: int, width: int, rng: np.random.Generator) -> None:
    """One to three rectangles, a tenth to a half of the sides long."""
    for _ in range(rng.integers(1, 4)):
        h, w = (max(1, int(n * rng.uniform(0.1, 0.5))) for n in (height, width))
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        draw.rectangle((left, top, left + w - 1, top + h - 1), fill=255)
