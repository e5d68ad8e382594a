"""Exponential moving average of a model's trainable weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def shadow_dtype(t: Tensor) -> torch.dtype:
    """Full precision for what would be held in half: a step of 1e-4 is lost there."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


class LitEma(nn.Module):
    """Holds a slowly moving copy ("shadow") of every trainable parameter of a model as full-precision buffers.

    Buffer names are the parameter names without dots, as in official checkpoints, beside `decay` and `num_updates`.
    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates; without `use_num_upates` (the spelling is
    that of the official argument) it is constant and `num_updates` is -1.

    With `rampup` it warms up as StyleGAN2-ADA's does: the half-life is at most that share of the training so far,
    0.5 ** (1 / min(log 0.5 / log decay, rampup n)) after n earlier updates, so 0 at first. There both are counted in
    images; a constant batch size cancels.

    `ema(model)` after an optimiser step moves the shadow; `with ema.swapped(model):` uses it.
    Raises ValueError for a decay outside [0, 1], a rampup that is not positive or has no updates to count, where two
    parameters would get one buffer name, and for a model without the parameters that are held.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True, rampup: float | None = None
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"got decay={decay}, expected a value in [0, 1]")
        if rampup is not None and (rampup <= 0 or not use_num_upates):
            raise ValueError(
                f"got rampup={rampup} and use_num_upates={use_num_upates}, expected a positive number and True"
            )
        self.rampup = rampup
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int32))
        self._n, self._decay, self._seen = 0 if use_num_upates else -1, decay, self._versions()
        self._stored: list[Tensor] = []
        self.m_name2s_name: dict[str, str] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                self._hold(name, p)

    def _hold(self, name: str, p: Tensor) -> None:
        key = name.replace(".", "")
        twin = next((n for n, k in self.m_name2s_name.items() if k == key), None)
        if twin is not None:
            raise ValueError(f"got parameters {twin!r} and {name!r}, expected names that differ without their dots")
        if hasattr(self, key):
            raise ValueError(f"got a parameter {name!r}, expected a name that LitEma itself does not use")
        self.m_name2s_name[name] = key
        self.register_buffer(key, p.detach().to(shadow_dtype(p), copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LitEma":
        """Follows `.to(device)`, but no `.half()`: the shadow stays in full precision."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _versions(self) -> tuple[int, ...]:
        return tuple(v for t in (self.num_updates, self.decay) for v in (id(t), t._version))

    def _next_decay(self) -> float:
        """Counts one update. The counters are mirrored in Python, so that no step waits for the device."""
        if self._seen != self._versions():  # loaded, moved or set from outside
            self._n, self._decay = int(self.num_updates), float(self.decay)
        decay = self._decay
        if self._n >= 0:
            decay = self._warmed_up(decay)
            self._n += 1
            self.num_updates.add_(1)
        self._seen = self._versions()
        return decay

    def _warmed_up(self, decay: float) -> float:
        """The decay of the update after the `_n` that were counted."""
        if self.rampup is None:
            return min(decay, (2 + self._n) / (11 + self._n))
        longest = self.rampup * self._n
        return 0.0 if longest == 0 else min(decay, 0.5 ** (1 / longest))

    def _pairs(self, model: nn.Module) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The model's parameters and their shadows, in the order of construction."""
        params = dict(model.named_parameters())
        missing = [name for name in self.m_name2s_name if name not in params]
        if missing:
            raise ValueError(f"got a model without {len(missing)} averaged parameters ({missing[0]!r} ...)")
        return [params[n] for n in self.m_name2s_name], [getattr(self, k) for k in self.m_name2s_name.values()]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """One step: shadow += (1 - decay) * (parameter - shadow)."""
        weight = 1.0 - self._next_decay()
        alike: list[tuple[Tensor, Tensor]] = []
        for p, s in zip(*self._pairs(model), strict=True):
            if p.dtype == s.dtype and p.device == s.device:
                alike.append((s, p))
            else:
                s.lerp_(p.to(s), weight)  # one at a time: never a second full-precision copy of the model
        if alike:
            torch._foreach_lerp_([s for s, _ in alike], [p for _, p in alike], weight)

    def reset_num_updates(self) -> None:
        """Starts the warm-up again."""
        self.num_updates.zero_()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's parameters with the shadow."""
        for p, s in zip(*self._pairs(model), strict=True):
            p.copy_(s)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps a copy of the parameters for `restore`."""
        self._stored = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Puts back what `store` kept; raises ValueError if the number of parameters is another."""
        parameters = list(parameters)
        if len(parameters) != len(self._stored):
            raise ValueError(f"got {len(parameters)} parameters, expected the {len(self._stored)} that were stored")
        for p, kept in zip(parameters, self._stored, strict=True):
            p.copy_(kept)
        self._stored = []

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model's parameters are the shadow; afterwards, always, the raw ones.

        Nothing is copied where the dtypes agree: the parameters point to the shadow meanwhile.
        """
        params, shadows = self._pairs(model)
        raw = [p.data for p in params]
        try:
            for p, s in zip(params, shadows, strict=True):
                p.data = s.to(p)
            yield
        finally:
            for p, r in zip(params, raw, strict=True):
                p.data = r
