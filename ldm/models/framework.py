"""What recipes take from Lightning: the base class `Module`, `rank_zero_info` and `rank_zero_warn`.

Importing Lightning takes three seconds, a seventh of the cold start of a Stable Diffusion picture. A script that only
draws calls `sampling_only()` before it imports a recipe: recipes are then plain modules, which cannot be trained.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)
_sampling_only = False


def sampling_only() -> None:
    """Recipes imported from here on are plain modules, unless Lightning is there already."""
    global _sampling_only
    _sampling_only = True


def _without_lightning() -> bool:
    return _sampling_only and "lightning" not in sys.modules


def __getattr__(name: str) -> Any:
    """`Module`, decided when the first recipe asks for it."""
    if name != "Module":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _without_lightning():
        return PlainModule
    from lightning.pytorch import LightningModule

    return LightningModule


class PlainModule(nn.Module):
    """Stands in for LightningModule where nothing is trained."""

    _trainer = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def rank_zero_info(message: str) -> None:
    """A line for the log, from one process only."""
    if _without_lightning():
        log.info(message)
        return
    from lightning.pytorch.utilities import rank_zero_info as say

    say(message)


def rank_zero_warn(message: str, **options: Any) -> None:
    """A warning, from one process only."""
    if _without_lightning():
        log.warning(message)
        return
    from lightning.pytorch.utilities import rank_zero_warn as warn

    warn(message, **options)
