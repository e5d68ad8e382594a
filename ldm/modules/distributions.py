"""Posterior distributions of autoencoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


class DiagonalGaussianDistribution:
    """q(z | x) = N(mean, diag(exp(logvar))) (Kingma & Welling 2014, appendix C.2).

    Args:
        parameters: [B, 2C, ...], mean and log-variance stacked along the channels; the log-variance is clamped to
            [-30, 20].
        deterministic: a point mass at the mean; `kl` and `nll` are then 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.deterministic = deterministic
        if deterministic:
            self.var = self.std = torch.zeros_like(self.mean)
        else:
            self.std = torch.exp(0.5 * self.logvar)
            self.var = torch.exp(self.logvar)

    def sample(self, randn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """z = mean + std * n, [B, C, ...]. `randn(template)` draws n; the default is the global generator."""
        if randn is not None:
            return self.mean + self.std * randn(self.mean)
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats per image, [B]; `other` None is N(0, 1). A point mass gives [0.]."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=tuple(range(1, terms.ndim)))

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log q(sample) summed over `dims` (default: all but the first), [B]. A point mass gives [0.]."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = LOG_2PI + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims if dims is not None else range(1, terms.ndim)))


class DiracDistribution:
    """A point mass, with the interface of a distribution."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) per element; numbers and tensors broadcast.

    Raises:
        ValueError: no argument is a tensor.
    """
    template = next((a for a in (mean1, logvar1, mean2, logvar2) if isinstance(a, Tensor)), None)
    if template is None:
        raise ValueError("normal_kl: got four numbers, expected at least one tensor")
    logvar1, logvar2 = (torch.as_tensor(v).to(template) for v in (logvar1, logvar2))
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))
