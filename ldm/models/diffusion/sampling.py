"""Sampling by name and seed, shared by the diffusion recipes: a row of `SAMPLERS` on a row of `GRIDS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import cfg, clip, inpaint
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Path, make_grid, slice_grid
from ldm.models.base import BaseModel
from ldm.util import SeededNoise, UserError, suggest

Condition = Mapping[str, Any]  # c_concat, c_crossattn, y: tensors [B, ...]; `uncond`: the same for guidance
Callback = Callable[[int, Tensor, Tensor, Tensor], object]  # (step, time, x_t, x0) -> true to stop


class SeededSampling(BaseModel):
    """A diffusion recipe that samples from seeds.

    Subclasses set the attributes below and give `path` and `denoiser` as properties or attributes.
    """

    channels: int  # of what the network denoises
    clip_denoised: bool
    v_posterior: float
    model: nn.Module
    path: Path
    denoiser: Callable[..., Tensor]  # (x_t, t, **condition) -> x0

    def exact_modules(self) -> list[nn.Module]:
        """Modules whose own buffers are noise levels or scales."""
        return [self]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeededSampling:
        """Follows `.to(...)`, but noise levels stay float32: in bfloat16, abar_0 = 0.9999 would be 1."""
        before = [(module, dict(module._buffers)) for module in self.exact_modules()]
        super()._apply(fn, recurse)
        for module, buffers in before:
            for name, old in buffers.items():
                new = module._buffers[name]
                if old is not None and new.dtype != old.dtype:
                    module._buffers[name] = old.to(new.device)
        return self

    @property
    def place(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def generate(
        self,
        cond: Condition | None,
        seeds: Sequence[int],
        size: tuple[int, int],
        steps: int,
        sampler: str,
        grid: str | None = None,
        eta: float | None = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        *,
        noise: Tensor | None = None,
        edit: Callable[[Tensor], Tensor] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """[len(seeds), channels, *size] in the space of the network; the arguments are those of `sample`.

        noise: instead of that from the seeds. edit: changes each prediction of x0.
        """
        cond, uncond = self.split_condition(cond)
        if scale != 1 and uncond is None:
            raise UserError(f"scale {scale}: guidance needs a model trained with cond_dropout (or on text)")
        if x0 is None and (mask is not None or strength != 1):
            raise UserError("mask and strength need x0, the picture to start from")
        path, randn, knobs = self.path, SeededNoise(seeds), self._knobs(sampler, eta)
        times = self.times(steps, grid, strength)
        x = randn((len(seeds), self.channels, *size), device=self.place) if noise is None else noise
        if x0 is not None and (mask is None or strength != 1):
            x = path.add_noise(x0, x, times[0])
        else:
            x = self.first_state(x, times[0])
        project = None if mask is None else inpaint(path, x0, mask, randn)
        denoise = cfg(self.denoise, cond, uncond, scale)
        denoise = clip(denoise) if self.clip_denoised else denoise
        guess = denoise if edit is None else lambda x, t: edit(denoise(x, t))
        x = SAMPLERS[sampler](guess, x, times, path=path, randn=randn, project=project, callback=callback, **knobs)
        return x if project is None else project(x, times[-1])

    def denoise(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x_t [B, C, h, w] and the time -> x0."""
        return self.denoiser(x, t, **cond)

    def first_state(self, noise: Tensor, t: Tensor) -> Tensor:
        """Unit noise -> the state that sampling starts from at time t; the same where x_T has unit variance."""
        return noise

    def as_condition(self, cond: Any) -> dict[str, Any]:
        """A condition as keyword arguments of the network."""
        return {k: v for k, v in (cond or {}).items() if k != "uncond"}

    def split_condition(self, cond: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(condition, unconditional condition); what the latter does not name, both have in common."""
        uncond, cond = cond.get("uncond") if isinstance(cond, Mapping) else None, self.as_condition(cond)
        return cond, None if uncond is None else {**cond, **self.as_condition(uncond)}

    def times(self, steps: int, grid: str | None, strength: float = 1.0) -> Tensor:
        """The grid of so many steps, float64; of image to image its last `strength` part."""
        try:
            return slice_grid(make_grid(grid or self.path.default_grid, self.path, steps), strength)
        except ValueError as e:
            raise UserError(str(e)) from e

    def _knobs(self, sampler: str, eta: float | None) -> dict[str, float]:
        if sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise UserError(f"sampler: got {sampler!r}{suggest(sampler, SAMPLERS)}, expected one of {known}")
        takes = inspect.signature(SAMPLERS[sampler].function).parameters
        if eta and "eta" not in takes:
            raise UserError(f"sampler {sampler} takes no eta")
        knobs = {"eta": eta} if eta is not None and "eta" in takes else {}
        return {**knobs, "v_posterior": self.v_posterior} if "v_posterior" in takes else knobs
