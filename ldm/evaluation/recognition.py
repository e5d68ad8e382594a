"""Classifiers: accuracy, calibration, and what corruptions do to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

from ldm.evaluation.corruptions import CORRUPTIONS
from ldm.evaluation.features import fitted
from ldm.evaluation.pictures import Pictures

SEVERITIES = (1, 3, 5)
Logits = Callable[[Tensor], Tensor]  # uint8 [B, C, H, W] -> [B, K]


def reader(model: Any, device: Any) -> Logits:
    """A classifier as a function of uint8 pictures, in evaluation mode."""

    @torch.no_grad()
    def read(pictures: Tensor) -> Tensor:
        model.eval()
        return model(fitted(pictures.to(device), None, None)).float().cpu()

    return read


def logits_of(read: Logits, pictures: Pictures, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Of all pictures, [N, K]; `change` is applied to each batch first."""
    return torch.cat([read(change(batch)) for batch in pictures.batches()])


def accuracy(logits: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """{"top1", "top5" (with more than five classes), "per_class", "nll"} of logits [N, K] and labels int64 [N]."""
    y = torch.from_numpy(labels)
    hit = logits.argmax(1) == y
    found: dict[str, Any] = {"top1": float(hit.float().mean())}
    if logits.shape[1] > 5:
        found["top5"] = float((logits.topk(5, 1).indices == y[:, None]).any(1).float().mean())
    chosen = [hit[y == c].float().mean() for c in range(logits.shape[1])]
    found["per_class"] = [None if bool(c.isnan()) else float(c) for c in chosen]
    found["nll"] = float(torch.nn.functional.cross_entropy(logits.double(), y))
    return found


def calibration(logits: Tensor, labels: np.ndarray, bins: int = 15) -> dict[str, float]:
    """Expected calibration error over bins of confidence (Guo et al. 2017), in [0, 1]."""
    y = torch.from_numpy(labels)
    error = multiclass_calibration_error(logits.softmax(1), y, logits.shape[1], n_bins=bins, norm="l1")
    return {"calibration_error": float(error)}


def robustness(
    read: Logits, pictures: Pictures, labels: np.ndarray, severities: Sequence[int] = SEVERITIES, seed: int = 0
) -> dict[str, Any]:
    """{"corruptions": {name: {severity: top-1}}, "corrupted_top1": their mean}."""
    y, table = torch.from_numpy(labels), {}
    for number, (name, corrupt) in enumerate(tqdm(CORRUPTIONS.items(), desc="corruptions", leave=False)):
        table[name] = {}
        for severity in severities:
            g = torch.Generator().manual_seed(seed * 10007 + number * 11 + severity)
            logits = logits_of(read, pictures, lambda x, c=corrupt, s=severity, g=g: c(x, s, g))
            table[name][str(severity)] = float((logits.argmax(1) == y).float().mean())
    mean = float(np.mean([v for row in table.values() for v in row.values()]))
    return {"corruptions": table, "corrupted_top1": mean}
