"""Class labels as a condition: read from the batch, dropped in training, asked for by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.base import BaseModel
from ldm.util import UserError


class ClassLabels(BaseModel):
    """A recipe that may know classes. Subclasses set the attributes below before the first batch."""

    cond_stage_key: str | None  # where the batch keeps the condition
    num_classes: int | None  # without the null class; None = unknown, or no classes
    cond_dropout: float
    has_null_class = False  # one more class than num_classes, the last one, for "no class"

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", or None if the model was trained without one."""
        return self.num_classes if self.has_null_class else None

    def class_config(self, params: Mapping[str, Any], num_classes: int | None, key: str) -> dict[str, Any]:
        """`params` of a network or embedder with its number of classes under `key`; sets `num_classes`.

        The null class that cond_dropout needs is the last one, one more than `num_classes`.
        """
        null, own = int(self.cond_dropout > 0), params.get(key)
        if num_classes is None:
            self.num_classes = own - null if isinstance(own, int) else None
            self.has_null_class = null > 0 and self.num_classes is not None
            return dict(params)
        if own not in (None, num_classes + null):
            kinds = f"{num_classes} classes{' and the null class' * null}"
            raise UserError(f"{key}: got {own}, expected {num_classes + null} ({kinds}); leave it out to have it set")
        self.num_classes, self.has_null_class = num_classes, null > 0
        return {**params, key: num_classes + null}

    def value_of(self, batch: Mapping[str, Any], key: str) -> Any:
        """batch[key], or a UserError that says which keys there are."""
        if key not in batch:
            raise UserError(f"the batch has no key {key!r}; the data set gives {sorted(batch)} (cond_stage_key)")
        return batch[key]

    def drop_labels(self, labels: Tensor) -> Tensor:
        """In training, each label becomes the null class with probability `cond_dropout`."""
        if not (self.training and self.cond_dropout):
            return labels
        drop = torch.rand(labels.shape, device=labels.device) < self.cond_dropout
        return labels.masked_fill(drop, self.null_class)

    def class_labels(self, seeds: Sequence[int], classes: Sequence[int] | None, text: Any, device: Any) -> Tensor:
        """Checked class numbers, int64 [len(seeds)]; None is seed mod number of classes."""
        if text:
            raise UserError("the model was trained on classes: it takes no prompt, give a class")
        if self.num_classes is None:
            raise UserError(f"{type(self).__name__} does not know its number of classes: set model.params.num_classes")
        classes = [s % self.num_classes for s in seeds] if classes is None else list(classes)
        classes = classes * len(seeds) if len(classes) == 1 else classes
        if len(classes) != len(seeds):
            raise UserError(f"got {len(classes)} classes for {len(seeds)} pictures, expected one each (or one for all)")
        wrong = [c for c in classes if not 0 <= c < self.num_classes]
        if wrong:
            raise UserError(f"class {wrong[0]} does not exist: the model knows 0 to {self.num_classes - 1}")
        return torch.tensor(classes, device=device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Labels are checked while they are on the host: on a GPU a wrong one is an assertion inside a kernel."""
        labels = batch.get(self.cond_stage_key) if isinstance(batch, Mapping) else None
        if self.num_classes is not None and isinstance(labels, Tensor) and labels.device.type == "cpu":
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"label {low if low < 0 else high} in batch[{self.cond_stage_key!r}], but the model has "
                    f"{self.num_classes} classes (0 to {self.num_classes - 1}): set model.params.num_classes"
                )
        return batch
