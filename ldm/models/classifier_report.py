"""What a classifier's epoch came to: accuracy of each class, confusion matrix, last and best value."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.models.classifier_pictures import confusion_picture
from ldm.models.framework import rank_zero_info
from ldm.util import to_pil

Config = dict[str, Any]
CLASSES = 20  # named in a line


class Report:
    """After each epoch over a whole split: `report_val.json` (or `_test`) and a picture of the confusion matrix; at the
    end of training and testing the figures of each class in a line.

    The JSON has, for each set of weights (`raw`, `ema`), this epoch's figures, those of each class, and the best
    epoch's. A recipe that uses it has `scores` and `confusion`: metrics by split, such as `val_ema`.

    Args:
        main: the score whose last and best value are stated.
    """

    def __init__(self, main: str) -> None:
        self.main = main
        self.best: dict[str, tuple[float, int]] = {}
        self.last: dict[str, float] = {}
        self.classes = ""
        self._before, self._started = 0.0, time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the training began, without the time in which it was stopped."""
        return self._before + (time.monotonic() - self._started) / 60

    def start(self) -> None:
        """Called when the training begins or goes on."""
        self._started = time.monotonic()

    def state_dict(self) -> Config:
        """What a resumed run has to know: the best values so far, and the minutes that they took."""
        return {"best": {k: list(v) for k, v in self.best.items()}, "minutes": self.minutes}

    def load_state_dict(self, state_dict: Config) -> None:
        """Goes on from there."""
        self.best = {k: (float(v), int(epoch)) for k, (v, epoch) in state_dict["best"].items()}
        self._before = float(state_dict["minutes"])

    def finish(self, recipe: Any, split: str) -> None:
        """Called when the recipe has seen the whole split."""
        trainer = recipe.trainer
        writes = trainer.is_global_zero and bool(trainer.loggers)
        report: Config = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        if split == "val":
            report["minutes"] = round(self.minutes, 2)
        for name in (n for n in recipe.scores if n.removesuffix("_ema") == split):
            suffix = name.removeprefix(split)
            scores = {k: float(s.compute()) for k, s in recipe.scores[name].items()}
            matrix = recipe.confusion[name].compute()
            recipe.confusion[name].reset()
            figures = recipe.per_class(matrix)
            part = {**scores, **figures}
            ((kind, values),) = figures.items()
            key = f"{split}/{self.main if kind == 'per_class' else kind}{suffix}"
            self.classes = f"{key} {by_class(values)}"  # the last one is of the weights that are used
            if split == "val":
                part["best"] = self._follow(recipe, f"val/{self.main}{suffix}", scores[self.main])
            report["ema" if suffix else "raw"] = part
            if writes:
                write_picture(trainer, split, f"confusion{suffix}", confusion_picture(matrix, recipe.class_names))
        if writes:
            path = Path(trainer.default_root_dir) / f"report_{split}.json"
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if split == "test":
            rank_zero_info(self.classes)

    def _follow(self, recipe: Any, key: str, value: float) -> Config:
        self.last[key] = value
        if value > self.best.get(key, (float("-inf"), 0))[0]:
            self.best[key] = value, recipe.trainer.current_epoch
        best, epoch = self.best[key]
        recipe.log(f"{key}_best", best, rank_zero_only=True)
        return {self.main: best, "epoch": epoch}

    def announce(self) -> None:
        """One line for each set of weights: the last and the best value; then the classes."""
        for key, value in self.last.items():
            best, epoch = self.best[key]
            rank_zero_info(f"{key}: {value:.4f} at the last epoch, best {best:.4f} at epoch {epoch}")
        if self.classes:
            rank_zero_info(self.classes)


def by_class(values: dict[str, float | None]) -> str:
    """name -> share, for a line: "by class, the lowest first: dog 71.0 %, cat 90.0 %"."""
    known = sorted((v, name) for name, v in values.items() if v is not None)
    which = f"the lowest {CLASSES} of {len(known)}" if len(known) > CLASSES else "the lowest first"
    return f"by class, {which}: " + ", ".join(f"{name} {100 * v:.1f} %" for v, name in known[:CLASSES])


def shares(right: Tensor, total: Tensor, names: list[str]) -> dict[str, float | None]:
    """name -> right / total, None where there is nothing to count."""
    pairs = zip(names, right.tolist(), total.tolist(), strict=True)
    return {name: round(r / t, 6) if t else None for name, r, t in pairs}


def write_picture(trainer: Any, split: str, name: str, picture: Tensor) -> None:
    """`images/<split>/<name>_gs-..._e-....png` in the run directory; picture [1, 3, H, W] in [-1, 1]."""
    folder = Path(trainer.default_root_dir) / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    to_pil(picture)[0].save(folder / f"{name}_gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}.png")
