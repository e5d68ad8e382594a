"""From what a network predicts to x0 and back: the only place that knows parametrisations.

Every parametrisation is linear, x0 = c_skip x_t + c_out F with the network's output F (EDM, Karras et al. 2022, eq. 7),
so one table of (c_skip, c_out) gives the conversion, its inverse, the training target and the loss weights.

    name  F predicts                                   on a path x_t = alpha x0 + sigma n
    eps   the noise n (DDPM)
    x0    the data
    v     alpha n - sigma x0 (Salimans & Ho 2022)
    flow  n - x0, the velocity dx/dt of FlowPath (Lipman et al. 2022)
    edm   the mix of the two with unit variance (EDM, table 1); for VEPath; input scaled by c_in, time ln(sigma) / 4
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import Path, VEPath, expand

SIGMA_DATA = 0.5  # EDM's standard deviation of the data


def _edm(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt()


SCALINGS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma, sigma_data: (1 / alpha, -sigma / alpha),
    "x0": lambda alpha, sigma, sigma_data: (torch.zeros_like(sigma), torch.ones_like(sigma)),
    "v": lambda alpha, sigma, sigma_data: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
    "flow": lambda alpha, sigma, sigma_data: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "edm": lambda alpha, sigma, sigma_data: _edm(sigma, sigma_data),
}


def scaling(
    parameterization: str, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) with the shape of alpha and sigma. Raises ValueError for an unknown parametrisation."""
    if parameterization not in SCALINGS:
        raise ValueError(f"parameterization: got {parameterization!r}, expected one of {', '.join(SCALINGS)}")
    return SCALINGS[parameterization](alpha, sigma, sigma_data)


def to_x0(
    parameterization: str, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Network output and x_t [B, ...] -> x0 [B, ...]; alpha, sigma: scalars or [B, 1, ...]."""
    c_skip, c_out = scaling(parameterization, alpha, sigma, sigma_data)
    return c_skip * x + c_out * out


def from_x0(
    parameterization: str, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """The inverse of `to_x0`: what the network would have said. Needs sigma > 0, and alpha > 0 for eps."""
    c_skip, c_out = scaling(parameterization, alpha, sigma, sigma_data)
    return (x0 - c_skip * x) / c_out


def target(
    parameterization: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """What the network should say about alpha x0 + sigma noise. Written out where the inverse would divide by alpha."""
    if parameterization == "eps":
        return noise
    if parameterization == "x0":
        return x0
    if parameterization == "v":
        return alpha * noise - sigma * x0
    if parameterization == "flow":
        return noise - x0
    return from_x0(parameterization, x0, alpha * x0 + sigma * noise, alpha, sigma, sigma_data)


# Weight of the squared error of x0 as a function of snr = alpha^2 / sigma^2; gamma is only used by min_snr.
LOSS_WEIGHTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "x0": lambda snr, gamma, sigma_data: torch.ones_like(snr),
    "eps": lambda snr, gamma, sigma_data: snr,  # DDPM's L_simple, eq. 14
    "v": lambda snr, gamma, sigma_data: snr + 1,
    "min_snr": lambda snr, gamma, sigma_data: snr.clamp(max=gamma),  # Hang et al. 2023, eq. 8
    "edm": lambda snr, gamma, sigma_data: snr + sigma_data**-2,  # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
}


def loss_weight(
    name: str,
    parameterization: str,
    alpha: Tensor,
    sigma: Tensor,
    gamma: float = 5.0,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Factor for the squared error of the network's output, with the shape of alpha.

    `uniform` is 1. The other names weight the error of x0 (LOSS_WEIGHTS); as dx0 / dF = c_out, the factor for the
    output is that times c_out^2: `eps` with an eps network is 1, `min_snr` with a v network is min(snr, gamma) /
    (snr + 1). Raises ValueError.
    """
    c_out = scaling(parameterization, alpha, sigma, sigma_data)[1]
    if name == "uniform":
        return torch.ones_like(alpha)
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"loss weight: got {name!r}, expected uniform, {', '.join(LOSS_WEIGHTS)}")
    if name in ("eps", "min_snr") and parameterization == "eps":  # alpha cancels: finite where alpha is 0
        return torch.ones_like(alpha) if name == "eps" else (gamma * (sigma / alpha) ** 2).clamp(max=1)
    return LOSS_WEIGHTS[name]((alpha / sigma) ** 2, gamma, sigma_data) * c_out**2


class Denoiser:
    """Any network as x0 predictor: Denoiser(net, path, parameterization)(x_t, t, **cond) -> x0.

    net(x, t, **cond) gets x [B, ...] and t [B] and returns [B, ...]; `path` gives t its meaning. Holds no parameters
    and adds no state-dict keys. Raises ValueError for an unknown parametrisation, and for `edm` off VEPath.
    """

    def __init__(
        self, net: Callable[..., Tensor], path: Path, parameterization: str = "eps", sigma_data: float = SIGMA_DATA
    ) -> None:
        if parameterization not in SCALINGS:
            raise ValueError(f"parameterization: got {parameterization!r}, expected one of {', '.join(SCALINGS)}")
        if parameterization == "edm" and not isinstance(path, VEPath):
            raise ValueError(f"parameterization 'edm': got {type(path).__name__}, expected VEPath")
        self.net, self.path, self.parameterization, self.sigma_data = net, path, parameterization, sigma_data

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x [B, ...], t scalar or [B] -> x0 [B, ...]."""
        alpha, sigma = self._levels(t, x)
        if self.parameterization == "edm":
            out = self.net(x / (sigma**2 + self.sigma_data**2).sqrt(), self._batch_time(t.log() / 4, x), **cond)
        else:
            out = self.net(x, self._batch_time(t, x), **cond)
        return to_x0(self.parameterization, out, x, alpha, sigma, self.sigma_data)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise [B, ...], t scalar or [B] -> what `net` should return for path.add_noise(x0, noise, t)."""
        return target(self.parameterization, x0, noise, *self._levels(t, x0), self.sigma_data)

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """t -> factor for the squared error of the network's output, with the shape of t; see `loss_weight`."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return loss_weight(name, self.parameterization, alpha, sigma, gamma, self.sigma_data)

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        t = t if t.ndim == 0 else t.to(x.device)  # a scalar on the host scales any device's tensor without a copy
        return expand(self.path.alpha(t), x.ndim), expand(self.path.sigma(t), x.ndim)

    @staticmethod
    def _batch_time(t: Tensor, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if t.is_floating_point() else t.dtype
        return t.to(x.device, dtype).expand(len(x))
