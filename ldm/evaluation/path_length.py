"""Perceptual path length (Karras et al. 2019, section 4.1): how evenly pictures change along lines between latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.vae import VAE
from ldm.util import SeededNoise, UserError

EPSILON = 1e-3  # of the line; the paper's 1e-4 is lost in float32 where features are small
Render = Callable[[Tensor, Any], Tensor]  # z [B, D], condition -> pictures in [-1, 1]
Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of pictures -> [B]


def latent_of(model: Any) -> tuple[int, Render] | None:
    """(D, from z to pictures) of a model that draws from a vector; None for others."""
    if isinstance(model, VAE):
        return model.latent_dim, lambda z, cond: model.decode(z)
    size = getattr(getattr(model, "generator", None), "z_dim", None)
    if size is None:
        return None
    if hasattr(model, "synthesize"):  # StyleGAN
        return size, lambda z, cond: model.synthesize(model.map(z, cond))
    return size, lambda z, cond: model.draw(z, cond)


@torch.no_grad()
def path_length(
    model: Any, distance: Distance, labels: np.ndarray | None, n: int, seed: int, device: Any, batch_size: int = 50
) -> dict[str, float]:
    """{"ppl", "ppl_std"}: d(g(z_t), g(z_(t + eps))) / eps^2 over `n` lines, the outer percentiles left out.

    Args:
        distance: a squared distance between pictures [B, C, H, W] in [-1, 1].
        labels: class of each line, or None.

    Raises:
        UserError: the model does not draw from one vector.
    """
    latent = latent_of(model)
    if latent is None:
        raise UserError(f"{type(model).__name__} does not draw from one vector: a path length cannot be measured")
    found = torch.cat(
        [distance(a, b).double().cpu() for a, b in _pairs(model, latent, labels, n, seed, device, batch_size)]
    )
    each = found.numpy() / EPSILON**2
    low, high = np.percentile(each, [1, 99])
    kept = each[(each >= low) & (each <= high)]
    return {"ppl": float(kept.mean()), "ppl_std": float(kept.std())}


def _pairs(
    model: Any, latent: tuple[int, Render], labels: Any, n: int, seed: int, device: Any, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    size, render = latent
    for start in tqdm(range(0, n, batch_size), desc="path length", leave=False):
        seeds = range(seed + start, seed + min(start + batch_size, n))
        noise = SeededNoise(seeds)
        a, b = (noise((len(seeds), size), device=device) for _ in range(2))
        t = noise.rand((len(seeds), 1), device=device)
        asked = {} if labels is None else {"classes": [int(c) for c in labels[start : start + len(seeds)]]}
        cond = model.condition(list(seeds), **asked)
        yield render(a.lerp(b, t), cond), render(a.lerp(b, t + EPSILON), cond)
