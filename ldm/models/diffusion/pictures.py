"""Pictures of a diffusion model at work, for `log_images`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.schedule import Path
from ldm.util import SeededNoise, image_grid, log_txt_as_img


def row(frames: Sequence[Tensor], n: int) -> Tensor:
    """T frames of a batch [B, C, H, W] -> one picture [1, C, H', W'], a line for each of the first n images."""
    stacked = torch.stack([f[:n].detach().float().cpu() for f in frames], dim=1)  # [n, T, C, H, W]
    return image_grid(stacked.flatten(0, 1), nrow=len(frames))[None]


def noising(path: Path, x: Tensor, frames: int = 8) -> list[Tensor]:
    """x [B, ...] at `frames` times from the least to the most noise."""
    noise = SeededNoise(range(len(x)))(x)
    return [path.add_noise(x, noise, t) for t in torch.linspace(path.t_min, path.t_max, frames, dtype=torch.float64)]


class Recorder:
    """A sampler's callback that keeps about `frames` states and x0 predictions, the last one among them."""

    def __init__(self, steps: int, frames: int = 8) -> None:
        self.steps, self.every = steps, max(1, steps // frames)
        self.states: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def __call__(self, i: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        if i % self.every == 0 or i == self.steps - 1:
            self.states.append(x)
            self.predictions.append(x0)


def box_masks(x: Tensor) -> Tensor:
    """[B, 1, H, W] for x [B, C, H, W]: 1 = keep, 0 in the middle quarter."""
    h, w = x.shape[2:]
    mask = torch.ones(len(x), 1, h, w, device=x.device, dtype=x.dtype)
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0
    return mask


def to_rgb(x: Tensor) -> Tensor:
    """A map [B, C, H, W] with any number of channels -> [B, 3, H, W] in [-1, 1], each channel in a fixed colour."""
    colours = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0)).to(x)
    y = F.conv2d(x.float(), colours.float())
    low, high = y.amin(), y.amax()
    return 2 * (y - low) / (high - low).clamp(min=1e-12) - 1


def class_pictures(
    batch: Mapping[str, Any], key: str, names: Sequence[str] | None, size: tuple[int, int]
) -> Tensor | None:
    """The classes of a batch as written pictures [B, 3, H, W]; size = (W, H)."""
    if "human_label" in batch:
        return log_txt_as_img(size, batch["human_label"])
    labels = batch[key].tolist()
    return log_txt_as_img(size, [names[i] if names else f"class {i}" for i in labels])
