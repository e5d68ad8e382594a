"""Two optimisers that work as one: Muon orthogonalises hidden matrices only, and something else moves the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.processor import Float32, multiplies_bfloat16
from ldm.util import class_of, instantiate_from_config

ROLE = "hidden"  # key of a parameter group: true for weights between the first and the last layer


class HiddenAndRest(torch.optim.Optimizer):
    """Matrices and filters between the first and the last layer go to one optimiser, everything else to another.

    Args:
        params: groups with the key `hidden` (`ldm.models.param_groups.groups` makes them).
        lr: of both, unless `rest` names its own.
        hidden: `{target: torch.optim.Muon, params}` (transformers: matrices only), or `timm.optim.Muon` (filters too).
        rest: `{target: torch.optim.AdamW, params}`.

    Raises:
        ValueError: no group is `hidden`.
        ConfigError: an optimiser that cannot be built.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float,
        hidden: Mapping[str, Any],
        rest: Mapping[str, Any],
    ) -> None:
        groups = [dict(g) for g in params]
        parts = [g for g in groups if g.get(ROLE)], [g for g in groups if not g.get(ROLE)]
        if not parts[0]:
            raise ValueError("got a network without layers between its first and its last one, expected some")
        self.parts = []
        for name, config, part in zip(("hidden", "rest"), (hidden, rest), parts, strict=True):
            if part:
                class_of(config, name)
                own = (config.get("params") or {}).get("lr", lr)
                part = [{**g, "lr": own * g.get("lr", lr) / lr} for g in part]
                self.parts.append(instantiate_from_config(config, params=part, **_rate(config, lr)))
        super().__init__([g for p in self.parts for g in p.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Schedulers and checkpoints see one list of groups and one state: the parts keep theirs in them."""
        at = 0
        for part in self.parts:
            part.param_groups = self.param_groups[at : at + len(part.param_groups)]
            at += len(part.param_groups)
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _rate(config: Mapping[str, Any], lr: float) -> dict[str, float]:
    """The learning rate, unless the config names one."""
    return {} if "lr" in (config.get("params") or {}) else {"lr": lr}


class _InFloat32:
    """An optimiser's step whose products are in float32 wherever it asks for bfloat16; the closure's are its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with Float32():
            super().step()
        return loss


def muon_for_this_processor(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Muon orthogonalises in bfloat16; in float32 on a CPU where that would take longer than the rest of the step.

    Args:
        optimizer: any; changed in place if it is Muon, or has it as a part, and its parameters are on a slow CPU.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        on_cpu = part.param_groups[0]["params"][0].device.type == "cpu"
        if "Muon" in type(part).__name__ and on_cpu and not multiplies_bfloat16():
            part.__class__ = type(type(part).__name__, (_InFloat32, type(part)), {})
    return optimizer
