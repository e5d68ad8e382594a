"""What is done to a batch of images and labels in training, by torchvision's transforms, and views of it in testing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ldm.util import UserError

MIXERS = (v2.MixUp, v2.CutMix)
VIEWS = ("none", "flip", "flip+shift")


class RandomNoise(v2.Transform):
    """Gaussian noise of a strength that is drawn for each image, so that clean ones are among them.

    Args:
        sigma: the largest deviation, of values in [0, 1].
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"got sigma={sigma}, expected a number above 0")
        self.sigma = sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"sigma": float(torch.rand(())) * self.sigma}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.gaussian_noise(inpt, 0.0, params["sigma"], clip=True)


class BatchTransform(v2.Transform):
    """A transform of a whole batch that draws something else for each image: one operation instead of one per image."""


class RandomShift(BatchTransform):
    """Images [B, C, H, W] moved by up to `pixels` up or down and left or right, edges mirrored.

    Raises UserError for images that are not larger than `pixels`.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"got pixels={pixels}, expected at least 1")
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if self.pixels >= min(height, width):
            raise UserError(
                f"model.params.augment_config: got RandomShift with pixels={self.pixels} for images of "
                f"{height}x{width}, expected at most {min(height, width) - 1}"
            )
        padded = F.pad(x, (self.pixels,) * 4, mode="reflect")
        corner = torch.randint(2 * self.pixels + 1, (2, batch, 1), device=x.device)
        rows = corner[0] + torch.arange(height, device=x.device)
        columns = corner[1] + torch.arange(width, device=x.device)
        image = torch.arange(batch, device=x.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]]  # [B, H, W, C]
        return moved.permute(0, 3, 1, 2)


class Cutout(BatchTransform):
    """A grey square in each of the images [B, C, H, W]; its middle is drawn, so that a part of it may lie outside.

    "Improved Regularization of Convolutional Neural Networks with Cutout" (DeVries & Taylor 2017), section 3.2.

    Args:
        size: side of the square in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"got size={size}, expected at least 1")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        batch, _, *sides = x.shape
        inside = []
        for side in sides:
            first = torch.randint(side, (batch, 1), device=x.device) - self.size // 2
            at = torch.arange(side, device=x.device)
            inside.append((at >= first) & (at < first + self.size))
        return x.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0.0)


class Augment(nn.Module):
    """Applies transforms in training: most of them to each image by itself, those for batches to the whole batch.

    Args:
        transforms: of `torchvision.transforms.v2`; they see float images [C, H, W] in [0, 1]. Then those of this module
            that take batches, which see [B, C, H, W] in [-1, 1]. Of several that mix (`MixUp`, `CutMix`) one is drawn
            for each batch.

    Raises:
        ValueError: something else than a transform.
    """

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        for t in transforms:
            if not isinstance(t, v2.Transform):
                raise ValueError(f"got {type(t).__name__}, expected a transform of torchvision.transforms.v2")
        self.single = nn.Sequential(*(t for t in transforms if not isinstance(t, (BatchTransform, *MIXERS))))
        self.batch = nn.Sequential(*(t for t in transforms if isinstance(t, BatchTransform)))
        self.mixers = nn.ModuleList(t for t in transforms if isinstance(t, MIXERS))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [-1, 1] and labels int64 [B] -> the same, or soft labels [B, num_classes] if mixed."""
        if len(self.single):
            images = [self.single(image) for image in (x + 1) / 2]
            x = (torch.stack(images) * 2 - 1).to(memory_format=torch.channels_last)
        x = self.batch(x)
        if len(self.mixers):
            chosen = int(torch.randint(len(self.mixers), ()))
            x, labels = self.mixers[chosen](x, labels)
        return x, labels


def views(x: Tensor, kind: str) -> list[tuple[Tensor, float]]:
    """The images [B, C, H, W] whose logits are averaged in testing, each with its weight; the weights sum to one.

    `none`: x itself. `flip`: and mirrored. `flip+shift`: with half the weight both of them, with the other half both of
    them moved by a pixel to the upper left and to the lower right, edges mirrored (Jordan 2024, section 3.5).
    """
    if kind not in VIEWS:
        raise ValueError(f"got test_views={kind!r}, expected one of {', '.join(VIEWS)}")
    if kind == "none":
        return [(x, 1.0)]
    both = [x, x.flip(3)]
    if kind == "flip":
        return [(v, 0.5) for v in both]
    padded = [F.pad(v, (1, 1, 1, 1), mode="reflect") for v in both]
    moved = [p[..., :-2, :-2] for p in padded] + [p[..., 2:, 2:] for p in padded]
    return [(v, 0.25) for v in both] + [(v, 0.125) for v in moved]
