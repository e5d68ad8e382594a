"""Where a condition enters the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config


def joined(parts: Tensor | Sequence[Tensor], dim: int = 1) -> Tensor:
    """A condition as one tensor: official callers pass lists, which are joined along axis 1."""
    if isinstance(parts, Tensor):
        return parts
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


class DiffusionWrapper(nn.Module):
    """Feeds a condition to the network where it belongs.

    Args:
        diff_model_config: `{target, params}` of the network, kept as `diffusion_model`.
        conditioning_key: None (conditions are ignored), concat (to the input's channels), crossattn (as context),
            hybrid (both), adm (as `y`) or crossattn-adm (SDXL: context and `y`).

    Raises:
        ValueError: unknown conditioning_key, or a condition that it needs is absent.
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm", "crossattn-adm")

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in self.KEYS:
            raise ValueError(f"conditioning_key: got {conditioning_key!r}, expected one of {self.KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | Sequence[Tensor] | None = None,
        c_crossattn: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], t [B] -> the network's output. Official callers give `y` as `c_crossattn`."""
        key = self.conditioning_key
        inputs: dict[str, Tensor] = {}
        if key in ("concat", "hybrid"):
            x = torch.cat([x, self._needed("c_concat", c_concat).to(x)], dim=1)
        if key in ("crossattn", "hybrid", "crossattn-adm"):
            inputs["context"] = self._needed("c_crossattn", c_crossattn)
        if key == "adm":
            inputs["y"] = self._needed("y", c_crossattn if y is None else y)
        elif key == "crossattn-adm":
            inputs["y"] = self._needed("y", y)
        # weights in half precision without autocast: the samplers' states stay in full precision around them
        dtype = next((p.dtype for p in self.diffusion_model.parameters()), x.dtype)
        out = self.diffusion_model(x.to(dtype), t, **inputs)
        return out.to(x.dtype) if isinstance(out, Tensor) and dtype != x.dtype else out

    def _needed(self, name: str, value: Tensor | Sequence[Tensor] | None) -> Tensor:
        if value is None:
            raise ValueError(f"conditioning_key {self.conditioning_key!r}: got no {name}, expected a tensor")
        return joined(value)
