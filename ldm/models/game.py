"""Watching a game of two networks: who is ahead, how much the pictures differ, when to warn, the film of a run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.models.framework import rank_zero_warn

COLLAPSED = 0.1  # share of the data's diversity below which the generator has collapsed
WON = 0.95  # accuracy above which the discriminator has won
ADVICE = {
    "collapse": "The generator makes one picture, or few (mode collapse). Try model.params.loss=wgan with penalty=gp, "
    "minibatch standard deviation, a lower learning rate, or augmentation",
    "won": "The discriminator has won: the generator learns nothing from it any more. Try model.params.augment="
    "diffaugment, a penalty on its gradient (model.params.penalty=r1), spectral normalisation, or a smaller one",
}


class Game:
    """Keeps the score over intervals of updates and warns of a game that has been lost for long enough.

    Args:
        every: calls of `add` in an interval.
        patience: updates for which a loss must last before a warning; it is said once, and again after a recovery.
    """

    def __init__(self, every: int = 100, patience: int = 500) -> None:
        self.every, self.patience = every, patience
        self._sums: dict[str, Tensor] = {}
        self._count, self._scored = 0, 0
        self._lost_since: dict[str, int] = {}
        self._said: set[str] = set()

    def add(self, **values: Tensor) -> None:
        """Takes scalars of one update, without waiting for the device; NaN counts as no value."""
        for name, value in values.items():
            pair = torch.stack([value.detach().float().nan_to_num(0.0), value.detach().isfinite().float()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        self._count += 1

    def begin(self, update: int) -> None:
        """Says where the first interval begins, if not at 0."""
        self._scored = update

    def score(self, update: int) -> dict[str, float] | None:
        """Means of the interval that `update` ends, None before its end.

        From diversity_real and diversity_fake comes `diversity`, the generator's as a share of the data's.
        """
        if self._count < self.every:
            return None
        table = torch.stack([*self._sums.values()]).tolist()
        means = {name: s / n for name, (s, n) in zip(self._sums, table, strict=True) if n}
        self._sums, self._count = {}, 0
        if means.get("diversity_real"):
            means["diversity"] = means.get("diversity_fake", 0.0) / means["diversity_real"]
        self._judge(update, "collapse", means.get("diversity", 1.0) < COLLAPSED, f"{means.get('diversity', 1):.1%}")
        self._judge(update, "won", means.get("accuracy", 0.5) > WON, f"{means.get('accuracy', 0.5):.1%}")
        self._scored = update
        return means

    def _judge(self, update: int, what: str, lost: bool, value: str) -> None:
        if not lost:
            self._lost_since.pop(what, None)
            self._said.discard(what)
            return
        since = self._lost_since.setdefault(what, self._scored)
        if update - since >= self.patience and what not in self._said:
            self._said.add(what)
            facts = {
                "collapse": f"pictures differ {value} as much as the data's (below {COLLAPSED:.0%})",
                "won": f"the discriminator tells {value} of all pictures apart (above {WON:.0%})",
            }
            rank_zero_warn(f"step {update}: for {update - since} steps {facts[what]}. {ADVICE[what]}")


def film_strip(folder: Path, key: str = "samples", frames: int = 8) -> Path | None:
    """Joins `frames` of the grids `<key>_gs-*.png` that a run has written to one picture, the first step at the left.

    Returns:
        `film_strip.png` beside the folder, or None where there are fewer than two grids.
    """
    files = {int(m[1]): p for p in sorted(folder.glob(f"{key}_gs-*.png")) if (m := re.search(r"_gs-(\d+)_", p.name))}
    steps = sorted(files)
    if len(steps) < 2:
        return None
    chosen = [
        steps[round(i * (len(steps) - 1) / (min(frames, len(steps)) - 1))] for i in range(min(frames, len(steps)))
    ]
    grids = [Image.open(files[step]).convert("RGB") for step in chosen]
    gap, line = 6, 14
    width, height = sum(g.width + gap for g in grids) - gap, max(g.height for g in grids) + line
    strip, left = Image.new("RGB", (width, height), "white"), 0
    for step, grid in zip(chosen, grids, strict=True):
        strip.paste(grid, (left, line))
        ImageDraw.Draw(strip).text((left + 2, 1), f"step {step}", fill="black")
        left += grid.width + gap
    path = folder.parent / "film_strip.png"
    strip.save(path)
    return path
