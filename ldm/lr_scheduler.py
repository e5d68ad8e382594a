"""Learning-rate schedules, the three official ones and steps: `schedule(n)` is the factor on `model.learning_rate`
after n updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


class LambdaWarmUpCosineScheduler:
    """Linear warm-up, then half a cosine: lr_min + (lr_max - lr_min) (1 + cos(pi t)) / 2.

    Args:
        warm_up_steps: updates of the linear rise from lr_start to lr_max.
        lr_min, lr_max, lr_start: factors on the base learning rate.
        max_decay_steps: update at which lr_min is reached.
        verbosity_interval: kept for official YAMLs; the learning rate is logged by LearningRateMonitor.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start

    def schedule(self, n: int, **kwargs: object) -> float:
        """Factor after `n` updates."""
        if n < self.warm_up_steps:
            return (self.lr_max - self.lr_start) / self.warm_up_steps * n + self.lr_start
        t = min((n - self.warm_up_steps) / max(1, self.max_decay_steps - self.warm_up_steps), 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(t * math.pi))

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)


class _Cycles:
    """List-valued parameters, one entry a cycle.

    Args:
        warm_up_steps: updates of the linear rise from f_start to f_max at the start of each cycle.
        f_min, f_max, f_start: factors on the base learning rate.
        cycle_lengths: updates of each cycle, warm-up included.
        verbosity_interval: kept for official YAMLs.

    Raises:
        ValueError: the lists differ in length.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        if len({len(v) for v in lists.values()}) != 1:
            raise ValueError(
                f"expected lists of one length, got {', '.join(f'{k}: {len(v)}' for k, v in lists.items())}"
            )
        self.lr_warm_up_steps, self.f_min, self.f_max, self.f_start = warm_up_steps, f_min, f_max, f_start
        self.cycle_lengths, self.ends = cycle_lengths, list(accumulate(cycle_lengths))

    def place(self, n: int) -> tuple[int, int]:
        """(cycle, update within it); past the last cycle its last one goes on."""
        for cycle, end in enumerate(self.ends):
            if n <= end:
                return cycle, n - (end - self.cycle_lengths[cycle])
        last = len(self.ends) - 1
        return last, n - (self.ends[last] - self.cycle_lengths[last])

    def schedule(self, n: int, **kwargs: object) -> float:
        """Factor after `n` updates."""
        cycle, n = self.place(n)
        warm = self.lr_warm_up_steps[cycle]
        if n < warm:
            return (self.f_max[cycle] - self.f_start[cycle]) / warm * n + self.f_start[cycle]
        return self.decay(cycle, n)

    def decay(self, cycle: int, n: int) -> float:
        """Factor after the warm-up, `n` updates into the cycle."""
        raise TypeError(f"{type(self).__name__} has no decay rule: use one of its subclasses")

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Cycles of warm-up and half a cosine from f_max to f_min."""

    def decay(self, cycle: int, n: int) -> float:
        warm = self.lr_warm_up_steps[cycle]
        t = min((n - warm) / max(1, self.cycle_lengths[cycle] - warm), 1.0)
        return self.f_min[cycle] + 0.5 * (self.f_max[cycle] - self.f_min[cycle]) * (1 + math.cos(t * math.pi))


class LambdaLinearScheduler(_Cycles):
    """Cycles of warm-up and a straight line from f_max to f_min: f_min + (f_max - f_min) (L - n) / L."""

    def decay(self, cycle: int, n: int) -> float:
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * max(length - n, 0) / length


class LambdaWarmUpStepScheduler:
    """Linear warm-up, then a constant that is multiplied by `gamma` at each milestone (He et al. 2015, section 3.4).

    Args:
        warm_up_steps: updates of the linear rise from lr_start to 1.
        milestones: shares of `max_decay_steps` in (0, 1), ascending.
        max_decay_steps: length of the run in updates.
        gamma: factor at each milestone.
        lr_start: factor at the start.

    Raises:
        ValueError: milestones out of order or of (0, 1).
    """

    def __init__(
        self,
        warm_up_steps: int,
        milestones: Sequence[float],
        max_decay_steps: int,
        gamma: float = 0.1,
        lr_start: float = 0.01,
    ) -> None:
        if list(milestones) != sorted(milestones) or not all(0 < m < 1 for m in milestones):
            raise ValueError(f"got milestones={list(milestones)}, expected ascending shares of the run in (0, 1)")
        self.warm_up_steps, self.milestones, self.max_decay_steps = warm_up_steps, milestones, max_decay_steps
        self.gamma, self.lr_start = gamma, lr_start

    def schedule(self, n: int, **kwargs: object) -> float:
        """Factor after `n` updates."""
        if n < self.warm_up_steps:
            return self.lr_start + (1 - self.lr_start) * n / self.warm_up_steps
        return self.gamma ** sum(n >= m * self.max_decay_steps for m in self.milestones)

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)
