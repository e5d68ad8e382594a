"""Bits per dimension, what a model would need to store a picture's 8-bit value on average; and the ELBO in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.pictures import Pictures
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.vae import VAE
from ldm.util import SeededNoise, UserError

LEVELS = 256


def has_likelihood(model: Any) -> bool:
    """Whether `bits_per_dimension` knows how."""
    tabled = isinstance(model, DDPM) and not isinstance(model, LatentDiffusion)
    return isinstance(model, VAE) or (tabled and model.parameterization != "flow")


@torch.no_grad()
def bits_per_dimension(
    model: Any, pictures: Pictures, device: Any, batch_size: int = 64, seed: int = 0
) -> dict[str, Any]:
    """An upper bound on -log2 p(x) / (C H W), the mean over pictures.

    A VAE gives the importance-weighted bound (the ELBO where `iwae_samples` is 0), a DDPM its variational bound, one
    network call for each of its T steps. Both are means over random draws; those of picture i come from seed + i: its
    figure depends neither on its batch nor on what was drawn before.

    Raises:
        UserError: the model has no likelihood.
    """
    if not has_likelihood(model):
        raise UserError(f"{type(model).__name__} gives no likelihood: bits per dimension cannot be measured")
    total, scale = 0.0, math.log(2) * pictures.size[0] * pictures.size[1] * pictures.channels
    labels = pictures.labels()
    bar = tqdm(total=len(pictures), desc="bits per dimension", unit="picture", leave=False)
    for start, batch in enumerate(pictures.batches(batch_size)):
        x = batch.to(device).float() / 127.5 - 1
        first = start * batch_size
        randn = SeededNoise(range(seed + first, seed + first + len(x)))
        if isinstance(model, VAE):
            nats = -model.iwae_bound(x, max(1, model.iwae_samples), randn=randn)
        else:
            nats = ddpm_bound(model, x, _condition(model, labels, first, len(x)), randn)
        total += float(nats.double().sum())
        bar.update(len(x))
    bar.close()
    found: dict[str, Any] = {"bits_per_dimension": total / len(pictures) / scale, "bits_per_dimension_seed": seed}
    if isinstance(model, VAE) and type(model.likelihood).__name__ == "Bernoulli":
        found["bits_per_dimension_note"] = "Bernoulli likelihood: of pixels as probabilities, not of 256 levels"
    return found


@torch.no_grad()
def elbo(model: VAE, pictures: Pictures, device: Any, batch_size: int = 64, seed: int = 0) -> dict[str, Any]:
    """E_q log p(x | z) - KL(q(z | x), p(z)) in nats per picture (Kingma and Welling 2014, equation 3), one z for each.

    The KL divergence is exact; z of picture i comes from seed + i.
    """
    total = 0.0
    bar = tqdm(total=len(pictures), desc="ELBO", unit="picture", leave=False)
    for start, batch in enumerate(pictures.batches(batch_size)):
        x = batch.to(device).float() / 127.5 - 1
        randn = SeededNoise(range(seed + start * batch_size, seed + start * batch_size + len(x)))
        posterior = model.encode(x)
        nats = model.log_likelihood(x, posterior.sample(randn)) - posterior.kl()
        total += float(nats.double().sum())
        bar.update(len(x))
    bar.close()
    return {"elbo": total / len(pictures), "elbo_seed": seed}


def _condition(model: DDPM, labels: Any, start: int, n: int) -> Any:
    if model.cond_stage_key is None or labels is None:
        return None
    return model.condition(range(n), classes=[int(c) for c in labels[start : start + n]])


def ddpm_bound(model: DDPM, x: Tensor, cond: Any, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """L_T + sum_t L_(t-1) + L_0 in nats, [B] (Ho et al. 2020, equations 5 and 13), at one draw of x_t for each t.

    randn: template -> noise of its shape.
    """
    mean, _, log_variance = model.q_mean_variance(x, torch.full((len(x),), model.num_timesteps - 1, device=x.device))
    zero = torch.zeros_like(mean)
    nats = _kl(mean, log_variance.expand_as(mean), zero, zero)
    for step in range(model.num_timesteps):
        t = torch.full((len(x),), step, device=x.device)
        x_t = model.q_sample(x, t, randn(x))
        predicted, _, log_p = model.p_mean_variance(x_t, t, True, cond)
        if step == 0:
            # the posterior's variance at t = 0 is 0: that of t = 1 stands in, as in the paper's code
            nats = nats - _log_discretised(x, predicted, model.posterior_log_variance_clipped[1].expand_as(x))
        else:
            true, _, log_q = model.q_posterior(x, x_t, t)
            nats = nats + _kl(true, log_q.expand_as(x), predicted, log_p.expand_as(x))
    return nats


def _kl(mean_a: Tensor, log_a: Tensor, mean_b: Tensor, log_b: Tensor) -> Tensor:
    """KL between diagonal normals given means and log-variances, summed over each picture [B]."""
    each = 0.5 * (log_b - log_a - 1 + (log_a - log_b).exp() + (mean_a - mean_b) ** 2 * (-log_b).exp())
    return each.flatten(1).sum(1)


def _log_discretised(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the normal's mass in x's bin of 1/255 of the range, open at both ends, summed over each picture [B]."""
    std, half = (0.5 * log_variance).exp(), 1 / (LEVELS - 1)
    upper = torch.special.ndtr((x - mean + half) / std)
    lower = torch.special.ndtr((x - mean - half) / std)
    upper = torch.where(x > 1 - half / 2, torch.ones_like(upper), upper)
    lower = torch.where(x < -1 + half / 2, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log().flatten(1).sum(1)
