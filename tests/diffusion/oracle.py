"""Data whose denoiser is known exactly: a mixture of Gaussians in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import (
    FlowPath,
    Path,
    VEPath,
    VPPath,
    make_beta_schedule,
    rescale_betas_zero_snr,
)


@dataclass
class Mixture:
    """sum_k weights_k N(means_k, stds_k^2), the same for every element of x."""

    path: Path
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.0, 0.2, 1.4)
    stds: tuple[float, ...] = (0.4, 0.3, 0.5)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        w, m, s = (torch.tensor(v, dtype=x.dtype) for v in (self.weights, self.means, self.stds))
        variance = alpha**2 * s**2 + sigma**2
        gap = x[..., None] - alpha * m
        share = (w.log() - gap**2 / (2 * variance) - variance.log() / 2).softmax(-1)
        return (share * (m + alpha * s**2 / variance * gap)).sum(-1)


def vp_path(timesteps: int = 1000, start: float = 0.00085, end: float = 0.012) -> VPPath:
    return VPPath((1 - make_beta_schedule("linear", timesteps, start, end)).cumprod())


def cosine_path() -> VPPath:
    return VPPath((1 - make_beta_schedule("cosine", 1000)).cumprod())


def zero_snr_path() -> VPPath:
    return VPPath((1 - rescale_betas_zero_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012))).cumprod())


PATHS: dict[str, Path] = {"vp": vp_path(), "ve": VEPath(), "flow": FlowPath()}
# between these times the exact solution is smooth; the order of convergence is measured there
SPANS = {"vp": (800.0, 60.0), "ve": (8.0, 0.15), "flow": (0.9, 0.12)}


def no_noise(x: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")
