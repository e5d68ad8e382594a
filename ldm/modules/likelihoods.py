"""Observation models p(x | z) of a VAE: what the decoder's output means. All in nats per image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.distributions import LOG_2PI


class Bernoulli(nn.Module):
    """Pixels as probabilities of ink (Kingma & Welling 2014, appendix C.1); the output is logits.

    Grey values count as fractional observations: the cross-entropy is then no normalised density, but the usual number.
    """

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, ...] in [-1, 1] and out of that shape -> log p(x | z), [B]."""
        return -F.binary_cross_entropy_with_logits(out, (x + 1) / 2, reduction="none").flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        """Expected image in [-1, 1]."""
        return 2 * torch.sigmoid(out) - 1


class Gaussian(nn.Module):
    """N(out, scale^2) per pixel, of images in [-1, 1].

    Args:
        scale: standard deviation.
        learned: fit one scale to the data instead (Rybkin et al. 2021, sigma-VAE); `scale` is then its start.
    """

    def __init__(self, scale: float = 0.1, learned: bool = False) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale: got {scale}, expected a positive number")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learned)

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        z = (x - out) * torch.exp(-self.log_scale)
        return -(0.5 * (z**2 + LOG_2PI) + self.log_scale).flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return out


class DiscretizedLogistic(nn.Module):
    """Logistic distribution integrated over each grey level (Salimans et al. 2017, PixelCNN++, equation 2).

    A probability, not a density: nats / (ln 2 * numbers per image) is bits per dimension.

    Args:
        scale: of the logistic, for images in [-1, 1]; learned from there.
        levels: grey levels.
    """

    def __init__(self, scale: float = 0.1, levels: int = 256) -> None:
        super().__init__()
        if scale <= 0 or levels < 2:
            raise ValueError(f"got scale {scale} and levels {levels}, expected a positive scale and at least 2 levels")
        self.levels = levels
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        half = 1.0 / (self.levels - 1)
        x = torch.round((x + 1) / 2 * (self.levels - 1)) * 2 * half - 1  # onto the grid
        inv = torch.exp(-self.log_scale)
        upper, lower = (x + half - out) * inv, (x - half - out) * inv
        log_cdf, log_rest = -F.softplus(-upper), -F.softplus(lower)  # log P(X <= upper), log P(X > lower)
        # log(sigmoid(upper) - sigmoid(lower)), exact and without cancellation
        inside = log_cdf + log_rest + torch.log(-torch.expm1(-2 * half * inv))
        log_p = torch.where(x < -1 + half, log_cdf, torch.where(x > 1 - half, log_rest, inside))
        return log_p.flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return out


class LogitLaplace(nn.Module):
    """Laplace distribution behind a sigmoid, with a scale for each number (Ramesh et al. 2021, appendix A.3).

    Pixels are first moved into (eps, 1 - eps), where the logit is finite.

    Args:
        eps: the paper's 0.1.
        least: smallest scale. Pixels come in steps of 1 / 255, about 0.02 behind the logit: drawings with flat colours
            would otherwise have no finite optimum.
    """

    def __init__(self, eps: float = 0.1, least: float = 0.01) -> None:
        super().__init__()
        self.eps, self.least = eps, least

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1], out [B, 2 C, H, W] (location and log-scale) -> log density of the moved x, [B]."""
        loc, log_scale = out.chunk(2, 1)
        log_scale = log_scale.clamp_min(math.log(self.least))
        u = (1 - 2 * self.eps) * (x + 1) / 2 + self.eps
        log_p = -(torch.logit(u) - loc).abs() * torch.exp(-log_scale) - log_scale - math.log(2) - torch.log(u * (1 - u))
        return log_p.flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        """The location as an image [B, C, H, W] in [-1, 1]."""
        u = torch.sigmoid(out.chunk(2, 1)[0])
        return (2 * (u - self.eps) / (1 - 2 * self.eps) - 1).clamp(-1, 1)


def make_likelihood(name: str, scale: float = 0.1) -> nn.Module:
    """The observation model of that name: bernoulli, gaussian, gaussian_learned or logistic.

    Raises:
        ValueError: another name.
    """
    makers = {
        "bernoulli": Bernoulli,
        "gaussian": lambda: Gaussian(scale),
        "gaussian_learned": lambda: Gaussian(scale, learned=True),
        "logistic": lambda: DiscretizedLogistic(scale),
    }
    if name not in makers:
        raise ValueError(f"likelihood: got {name!r}, expected one of {', '.join(makers)}")
    return makers[name]()
