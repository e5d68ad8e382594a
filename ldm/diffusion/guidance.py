"""Wrappers around a denoiser: classifier-free guidance, clipping, inpainting. Samplers know none of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import Path

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t) -> x0 [B, ...]
Randn = Callable[[Tensor], Tensor]  # a template [B, ...] -> standard normal noise of its shape, dtype and device


def cfg(
    denoise: Callable[..., Tensor],
    cond: Mapping[str, Any] | None,
    uncond: Mapping[str, Any] | None = None,
    scale: float = 1.0,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): u + scale (c - u), in one call on a batch of 2 B.

    cond, uncond: keyword arguments of `denoise`, each a tensor [B, ...] or a list or dict of such, of equal structure
    and shapes. Without `uncond`, or with scale 1, only `cond` is used, at half the cost. Acting on x0 equals acting on
    eps, v or flow, since they are linear in x0. Raises ValueError.
    """
    cond = dict(cond or {})
    if uncond is None or scale == 1:
        return lambda x, t: denoise(x, t, **cond)
    both = _stack(dict(uncond), cond, "condition")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        out = denoise(torch.cat([x, x]), t if t.ndim == 0 else torch.cat([t, t]), **both)
        x0_uncond, x0_cond = out.chunk(2)
        return x0_uncond + scale * (x0_cond - x0_uncond)

    return guided


def _stack(uncond: Any, cond: Any, name: str) -> Any:
    """The two structures joined along the batch axis, tensor by tensor."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.shape != uncond.shape:
            raise ValueError(f"guidance: got unconditional {name} {tuple(uncond.shape)}, expected {tuple(cond.shape)}")
        return torch.cat([uncond, cond])
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        return {key: _stack(uncond[key], cond[key], f"{name}[{key!r}]") for key in cond}
    if isinstance(cond, list) and isinstance(uncond, list) and len(cond) == len(uncond):
        return [_stack(u, c, f"{name}[{i}]") for i, (u, c) in enumerate(zip(uncond, cond, strict=True))]
    raise ValueError(f"guidance: got unconditional {name} {_describe(uncond)}, expected {_describe(cond)}")


def _describe(value: Any) -> str:
    detail = f" with keys {sorted(value)}" if isinstance(value, Mapping) else ""
    return type(value).__name__ + detail + (f" of {len(value)}" if isinstance(value, list) else "")


def clip(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """x0 kept in [-limit, limit], as DDPM's sampler does in pixel space. Wrap it around `cfg`, not inside."""
    return lambda x, t: denoise(x, t).clamp(-limit, limit)


def inpaint(path: Path, x0: Tensor, mask: Tensor, randn: Randn) -> Callable[[Tensor, Tensor], Tensor]:
    """A sampler's `project`: before each step, the known part is x0 noised to time t.

    x0 [B, C, H, W]; mask [B, 1, H, W] in [0, 1], 1 = keep. After sampling, project(x, grid[-1]) on a grid that ends at
    clean data puts the known part in place exactly.
    """

    def project(x: Tensor, t: Tensor) -> Tensor:
        return mask * path.add_noise(x0, randn(x0), t) + (1 - mask) * x

    return project
