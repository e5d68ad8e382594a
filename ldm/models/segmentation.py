"""Semantic segmentation: a label for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from ldm.models.classifier import Classifier, Config
from ldm.models.classifier_pictures import enlarge
from ldm.models.classifier_report import shares

IGNORE = 255  # the label of pixels that do not count


class Segmenter(Classifier):
    """A network that maps images [B, C, H, W] in [-1, 1] to logits of every pixel [B, num_classes, H, W].

    Logs train/loss, train/acc (share of pixels, of the batch) and, over whole epochs, val/loss, val/miou (mean over the
    classes of intersection over union), val/acc (of pixels), val/miou_best, the same for the test set and as `..._ema`.
    The report has the IoU of each class.

    Args:
        network_config, num_classes: as in `Classifier`.
        label_key: batch key of the labels, int64 [B, H, W]; 255 does not count.
        others: as in `Classifier`; whatever changes images alone (`augment_config`, `distill_config`, `test_views`) is
            refused, since the masks would not follow.

    Raises:
        ValueError: one of these is given.
    """

    main_score = "miou"

    def __init__(self, network_config: Config, num_classes: int, *, label_key: str = "mask", **others: Any) -> None:
        for name in ("augment_config", "distill_config"):
            if others.get(name):
                raise ValueError(f"got {name}, which changes images but not their masks: leave it out")
        if others.get("test_views", "none") != "none":
            raise ValueError(f"got test_views={others['test_views']!r}, expected none for segmentation")
        super().__init__(network_config, num_classes, label_key=label_key, **others)

    def _new_scores(self) -> nn.ModuleDict:
        options: Config = {"num_classes": self.num_classes, "ignore_index": IGNORE, "validate_args": False}
        accuracy = MulticlassAccuracy(average="micro", **options)
        return nn.ModuleDict({"miou": MulticlassJaccardIndex(**options), "acc": accuracy})

    def _new_confusion(self) -> nn.Module:
        return MulticlassConfusionMatrix(self.num_classes, ignore_index=IGNORE, validate_args=False)

    def per_class(self, matrix: Tensor) -> dict[str, Any]:
        """Intersection over union of each class; None for a class that is neither there nor predicted."""
        right = matrix.diagonal()
        names = [self.name_of(i) for i in range(self.num_classes)]
        return {"iou": shares(right, matrix.sum(0) + matrix.sum(1) - right, names)}

    def keep_mistakes(self, x: Tensor, logits: Tensor, labels: Tensor) -> None:
        """None are kept: hardly a picture is without a wrong pixel."""

    def _out_of_range(self, labels: Tensor) -> Tensor:
        return super()._out_of_range(labels) & (labels != IGNORE)

    def cross_entropy(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Logits [B, num_classes, H, W], labels [B, H, W] -> scalar, the mean over pixels that count."""
        return F.cross_entropy(
            logits.float(), target, self.class_weights, ignore_index=IGNORE, label_smoothing=smoothing
        )

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and accuracy over the pixels of the batch that count."""
        x, labels = self.get_input(batch, self.first_stage_key), batch[self.label_key]
        loss, logits = self._training_loss(x, labels) if self.training else self._plain_loss(x, labels)
        counts = labels != IGNORE
        accuracy = ((logits.argmax(1) == labels) & counts).sum() / counts.sum().clamp_min(1)
        return loss, {"loss": loss, "acc": accuracy.detach()}

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8) -> dict[str, Tensor]:
        """`inputs`: the images; `masks` and `predictions`: labels in colours, black where none counts."""
        x, labels = self.get_input(batch, self.first_stage_key)[:n], batch[self.label_key][:n]
        with self.ema_scope():
            predicted = self.predict(x).argmax(1)
        return {
            "inputs": enlarge(x),
            "masks": enlarge(coloured(labels, self.num_classes)),
            "predictions": enlarge(coloured(predicted, self.num_classes)),
        }


def coloured(labels: Tensor, num_classes: int) -> Tensor:
    """int [B, H, W] -> [B, 3, H, W] in [-1, 1]: a colour for each class, black for 255."""
    palette = torch.tensor([*colours(num_classes), (-1.0, -1.0, -1.0)])
    index = torch.where(labels == IGNORE, num_classes, labels).cpu()
    return palette[index].permute(0, 3, 1, 2)


def colours(n: int) -> Sequence[tuple[float, ...]]:
    """n colours in [-1, 1], hues a golden angle apart."""
    import colorsys

    rgb = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.95 - 0.25 * (i % 2)) for i in range(n))
    return [tuple(2 * c - 1 for c in colour) for colour in rgb]
