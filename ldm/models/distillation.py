"""Learning from another run's answers ("Distilling the Knowledge in a Neural Network", Hinton et al. 2015)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.util import UserError


class Teacher:
    """A trained classifier whose softened answers are a second target.

    Args:
        run: run directory or checkpoint of a classifier over the same classes and sizes of images.
        weight: share of this loss in [0, 1]; the labels have the rest.
        temperature: the logits of both are divided by it.

    Raises:
        ValueError: weight or temperature out of range.
    """

    def __init__(self, run: str, weight: float = 0.5, temperature: float = 2.0) -> None:
        if not 0 <= weight <= 1 or temperature <= 0:
            raise ValueError(f"got weight={weight}, temperature={temperature}, expected one in [0, 1], one above 0")
        self.run, self.weight, self.temperature = run, weight, temperature
        self._model: Any = None

    def model(self, device: torch.device) -> Any:
        """The teacher in evaluation mode, with averaged weights where it has them; read when it is first asked."""
        if self._model is None:
            from ldm.generate import load_run

            model, _ = load_run(self.run)
            if not hasattr(model, "num_classes"):
                raise UserError(f"distill_config: {self.run} is a {type(model).__name__}, expected a classifier")
            if model.use_ema:
                model.model_ema.copy_to(model.model)
            self._model = model
        return self._model.to(device)

    def mix(self, loss: Tensor, logits: Tensor, x: Tensor) -> Tensor:
        """(1 - weight) loss + weight T^2 KL(teacher, student) (section 2).

        Args:
            loss: of the labels.
            logits: the student's, [B, num_classes].
            x: what it saw, [B, C, H, W] in [-1, 1].

        Raises:
            UserError: the teacher knows another number of classes.
        """
        with torch.no_grad():
            target = self.model(x.device)(x)
        if target.shape != logits.shape:
            raise UserError(
                f"distill_config: {self.run} has {target.shape[1]} classes, the model {logits.shape[1]}: both must "
                "know the same"
            )
        t = self.temperature
        ours, theirs = ((v.float() / t).log_softmax(1) for v in (logits, target))
        soft = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * t**2 * soft
