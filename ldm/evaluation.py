"""Figures that say how good a model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ldm.generate import batches
from ldm.util import UserError


@torch.no_grad()
def class_agreement(
    model: Any, classifier: Any, seeds: Sequence[int], batch_size: int, knobs: dict[str, Any]
) -> dict[str, Any]:
    """How often `classifier` reads the class that `model` was asked for; class of picture i: seed_i mod classes.

    Returns:
        {"class_agreement": share in [0, 1], "n", "per_class": share of each class}.

    Raises:
        UserError: the generator has no classes, or another number of them.
    """
    right, asked = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    classes = classifier.num_classes
    for part in tqdm(list(batches(seeds, batch_size)), desc="evaluating", unit="batch", leave=False):
        labels = [s % classes for s in part]
        cond = model.condition(part, classes=labels)
        if cond is None:
            raise UserError("the generative run knows no classes: class agreement cannot be measured")
        scores = classifier(model.sample(cond, seeds=part, **knobs))
        if scores.shape[1] != classes:
            raise UserError(f"the classifier has {scores.shape[1]} classes, expected {classes}")
        want = torch.tensor(labels)
        right = torch.cat([right, scores.argmax(1).cpu() == want])
        asked = torch.cat([asked, want])
    per_class = [float(right[asked == c].float().mean()) for c in range(classes)]
    return {"class_agreement": float(right.float().mean()), "n": len(right), "per_class": per_class}
