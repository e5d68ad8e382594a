"""Classifiers: accuracy, calibration, and what corruptions do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.corruptions import CORRUPTIONS
from ldm.evaluation.features import fitted
from ldm.evaluation.pictures import Pictures

SEVERITIES = (1, 3, 5)
BINS = 15  # of confidence, for the calibration error
Logits = Callable[[Tensor], Tensor]  # uint8 [B, C, H, W] -> [B, K]


def reader(model: Any, device: Any) -> Logits:
    """A classifier as a function of uint8 pictures, in evaluation mode."""

    @torch.no_grad()
    def read(pictures: Tensor) -> Tensor:
        model.eval()
        return model(fitted(pictures.to(device), None, None)).float().cpu()

    return read


def readings(
    read: Logits, pictures: Pictures, labels: np.ndarray, change: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [B, K], classes int64 [B]) of one batch after the other; `change` is applied to each batch first."""
    start = 0
    for batch in pictures.batches():
        logits = read(change(batch))
        yield logits, torch.from_numpy(labels[start : start + len(logits)])
        start += len(logits)


class Answers:
    """What figures need of a classifier's answers, added up batch by batch: sums for each class and each bin.

    Attributes:
        n: pictures.
        asked, right, right5: of each class, how many there are, and how often it is the first answer, or among the
            first five, float64 [K].
        nll: sum of the cross-entropies.
        sure, hits: of each bin of confidence, the sum of the confidences and the right answers, float64 [BINS + 1]; the
            last bin holds those that are wholly sure.
    """

    def __init__(self, classes: int) -> None:
        self.n, self.nll = 0, 0.0
        self.asked, self.right, self.right5 = torch.zeros(3, classes, dtype=torch.float64)
        self.sure, self.hits = torch.zeros(2, BINS + 1, dtype=torch.float64)

    def add(self, logits: Tensor, y: Tensor) -> Answers:
        """Takes in logits [B, K] and classes int64 [B]."""
        self.n += len(y)
        confidence, answer = logits.softmax(1).max(1)
        hit = (answer == y).double()
        five = (logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]).any(1).double()
        for table, value in ((self.asked, torch.ones_like(hit)), (self.right, hit), (self.right5, five)):
            table.index_add_(0, y, value)
        self.nll += float(F.cross_entropy(logits.double(), y, reduction="sum"))
        place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1), right=True) - 1
        for table, value in ((self.sure, confidence.double()), (self.hits, hit)):
            table.index_add_(0, place, value)
        return self


def answers(batches: Iterator[tuple[Tensor, Tensor]]) -> Answers:
    """Of all of `readings`; no more than two batches of logits are held."""
    logits, y = next(batches)
    found = Answers(logits.shape[1]).add(logits, y)
    for logits, y in batches:
        found.add(logits, y)
    return found


def accuracy(found: Answers) -> dict[str, Any]:
    """{"top1", "top5" (with more than five classes), "per_class", "nll"}."""
    figures: dict[str, Any] = {"top1": float(found.right.sum() / found.n)}
    if len(found.right) > 5:
        figures["top5"] = float(found.right5.sum() / found.n)
    pairs = zip(found.right.tolist(), found.asked.tolist(), strict=True)
    figures["per_class"] = [right / asked if asked else None for right, asked in pairs]
    figures["nll"] = found.nll / found.n
    return figures


def calibration(found: Answers) -> dict[str, float]:
    """Expected calibration error over bins of confidence (Guo et al. 2017), in [0, 1]."""
    return {"calibration_error": float((found.hits - found.sure).abs().sum() / found.n)}


def robustness(
    read: Logits, pictures: Pictures, labels: np.ndarray, severities: Sequence[int] = SEVERITIES, seed: int = 0
) -> dict[str, Any]:
    """{"corruptions": {name: {severity: top-1}}, "corrupted_top1": their mean}."""
    table: dict[str, dict[str, float]] = {}
    for number, (name, corrupt) in enumerate(tqdm(CORRUPTIONS.items(), desc="corruptions", leave=False)):
        table[name] = {}
        for severity in severities:
            g = torch.Generator().manual_seed(seed * 10007 + number * 11 + severity)
            found = readings(read, pictures, labels, lambda x, c=corrupt, s=severity, g=g: c(x, s, g))
            table[name][str(severity)] = sum(int((a.argmax(1) == y).sum()) for a, y in found) / len(labels)
    mean = float(np.mean([v for row in table.values() for v in row.values()]))
    return {"corruptions": table, "corrupted_top1": mean}
