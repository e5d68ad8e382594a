"""A small evaluation while a model trains, for curves and for choosing the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ldm.evaluation import distances, quality
from ldm.evaluation.features import FeatureNetwork, find_features
from ldm.evaluation.pictures import Pictures, of_dataset
from ldm.util import UserError, suggest

# name -> figures from features of drawn and of real pictures; `agreement` needs logits instead
FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "fid": lambda a, b: {"fid": distances.frechet_distance(distances.moments(a), distances.moments(b))},
    "kid": lambda a, b: {"kid": distances.kernel_distance(a, b)["kid"]},
    "prc": distances.precision_recall,
    "dc": distances.density_coverage,
    "diversity": lambda a, b: {"diversity": distances.diversity(distances.moments(a), distances.moments(b))},
}


class Evaluate(Callback):
    """Draws pictures at the first validation after every `every_n_steps` updates; logs `val/fid` and so on.

    The same seeds are drawn every time. Between two evaluations the last figures are logged again, so that a
    ModelCheckpoint can monitor them.

    Args:
        every_n_steps: updates between two evaluations.
        n: drawn pictures, shared out over the processes.
        metrics: fid, kid, prc, dc, diversity, agreement.
        features: see `ldm.evaluation.features.find_features`.
        split: of the real pictures: train or validation.
        limit: real pictures at most.
        knobs: of the model's `sample()`.
        batch_size: pictures a call.

    Raises:
        UserError: an unknown metric; a model that draws nothing.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        n: int = 500,
        metrics: Sequence[str] = ("fid",),
        features: str | None = None,
        split: str = "train",
        limit: int = 10000,
        knobs: dict[str, Any] | None = None,
        batch_size: int = 100,
    ) -> None:
        for name in metrics:
            if name not in (*FIGURES, "agreement"):
                known = (*FIGURES, "agreement")
                raise UserError(f"callbacks.evaluate: metric {name}: expected {', '.join(known)}{suggest(name, known)}")
        self.every_n_steps, self.n, self.metrics, self.batch_size = every_n_steps, n, tuple(metrics), batch_size
        self.features, self.split, self.limit, self.knobs = features, split, limit, dict(knobs or {})
        self.step: int | None = None  # of the last evaluation
        self.figures: dict[str, float] = {}
        self._network: FeatureNetwork | None = None
        self._real: np.ndarray | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "figures": self.figures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.figures = state_dict["step"], state_dict["figures"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(pl_module, "sample"):
            raise UserError(f"callbacks.evaluate: {type(pl_module).__name__} draws no pictures")
        if self.split not in trainer.datamodule.configs:
            raise UserError(
                f"callbacks.evaluate: split {self.split}: the data has {', '.join(trainer.datamodule.configs)}"
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.training and not trainer.validating:
            return
        if self.step is None or trainer.global_step - self.step >= self.every_n_steps:
            self.figures, self.step = self.measure(trainer, pl_module), trainer.global_step
        pl_module.log_dict({f"val/{k}": v for k, v in self.figures.items()}, rank_zero_only=False)

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, float]:
        """The figures of the model as it is now, with averaged weights where there are."""
        if self._network is None:
            dataset = trainer.datamodule.datasets[self.split]
            self._prepare(of_dataset(dataset, {}, getattr(model, "first_stage_key", "image")))
        self._network.to(model.device)
        share = -(-self.n // trainer.world_size)
        seeds = range(trainer.global_rank * share, (trainer.global_rank + 1) * share)
        found = [self._draw(model, seeds[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]
        drawn, logits = (self._gather(trainer, model, part) for part in zip(*found, strict=True))
        figures: dict[str, float] = {}
        for name in self.metrics:
            figures |= self._agreement(model, logits) if name == "agreement" else FIGURES[name](drawn, self._real)
        return figures

    def _prepare(self, real: Pictures) -> None:
        self._network = find_features(self.features, real.about["data"])
        n = min(self.limit, len(real))
        parts = [self._network(real.get(range(i, min(i + 256, n))))[0] for i in range(0, n, 256)]
        self._real = torch.cat(parts).numpy()

    def _draw(self, model: pl.LightningModule, seeds: range) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]), model.ema_scope():
            x = model.sample(model.condition(list(seeds)), seeds=list(seeds), **self.knobs)
        features, logits = self._network(((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
        return features, torch.empty(len(features), 0) if logits is None else logits

    @staticmethod
    def _gather(trainer: pl.Trainer, model: pl.LightningModule, parts: Sequence[Tensor]) -> np.ndarray:
        """Of all processes, in the order of the seeds."""
        x = torch.cat(list(parts))
        if trainer.world_size > 1:
            x = model.all_gather(x.to(model.device)).flatten(0, 1)
        return x.cpu().numpy()

    @staticmethod
    def _agreement(model: pl.LightningModule, logits: np.ndarray) -> dict[str, float]:
        classes = getattr(model, "num_classes", None)
        if logits.shape[1] != classes:
            raise UserError(
                f"callbacks.evaluate: agreement: the features have {logits.shape[1]} classes, not {classes}"
            )
        asked = np.arange(len(logits)) % classes
        return {"agreement": quality.class_agreement(logits, asked)["class_agreement"]}
