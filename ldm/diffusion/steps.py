"""What the samplers share: noise levels, the one step that all of them take, and the solvers' coefficients.

Coefficients are float64 scalars on the grid's device (the host): no step waits for an accelerator.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise, Randn
from ldm.diffusion.schedule import Path

Project = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> x_t
Callback = Callable[[int, Tensor, Tensor, Tensor], object]  # (step, new time, new x, x0) -> true to stop


BLIND = 1000.0  # sigma / alpha above which nobody can see the image


class Point(NamedTuple):
    """A time and its noise level; all scalar tensors."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @property
    def rho(self) -> Tensor:
        return (-self.lam).exp()


def point(path: Path, t: Tensor) -> Point:
    return Point(t, path.alpha(t), path.sigma(t), path.lam(t))


def steps(path: Path, grid: Tensor) -> Iterator[tuple[int, tuple[Point, Point]]]:
    points = [Point(*row) for row in zip(*point(path, grid), strict=True)]
    return enumerate(pairwise(points))


def predict(denoise: Denoise, project: Project | None, x: Tensor, t: Point) -> tuple[Tensor, Tensor]:
    x = x if project is None else project(x, t.t)
    return x, denoise(x, t.t)


def eps_of(x: Tensor, x0: Tensor, t: Point) -> Tensor:
    return (x - t.alpha * x0) / t.sigma


def move(x: Tensor, x0: Tensor, t: Point, s: Point, sigma: Tensor | None = None) -> Tensor:
    """The step of the family, from t to s (to noise level `sigma` if given)."""
    ratio = (s.sigma if sigma is None else sigma) / t.sigma
    return ratio * x + (s.alpha - t.alpha * ratio) * x0


def move_along(x0: Tensor, eps: Tensor, slope: Tensor, t: Point, s: Point) -> tuple[Tensor, Tensor]:
    """z moved by (rho_s - rho_t) slope, where `slope` improves on eps: x_s, and the x0 that goes with the slope."""
    # From pure noise (alpha 0, or cosine's last step, rho = 20,000) the step in rho has no scale: there, Euler's.
    change = (t.rho < BLIND).to(t.rho) * (slope - eps)
    x0 = x0 - t.rho * change
    return s.alpha * x0 + s.sigma * (eps + change), x0


def split(t: Point, s: Point, eta: float) -> tuple[Tensor, Tensor]:
    """sigma_s as sigma_down (kept) and sigma_up (fresh noise), DDIM eq. 16: eta 0 none fresh, 1 as much as DDPM."""
    fresh = (t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2).clamp(min=0).sqrt()
    up = torch.minimum(eta * s.sigma / t.sigma * fresh, s.sigma)
    return (s.sigma**2 - up**2).sqrt(), up


def lagrange_means(nodes: list[Tensor], start: Tensor, end: Tensor) -> list[Tensor]:
    """Mean over [start, end] of each Lagrange polynomial of the nodes; two Gauss points are exact up to degree 3."""
    means = []
    for j, node in enumerate(nodes):
        values = []
        for g in (-(3**-0.5), 3**-0.5):
            u = start + (end - start) * (1 + g) / 2
            values.append(math.prod(((u - o) / (node - o) for k, o in enumerate(nodes) if k != j), start=u / u))
        means.append((values[0] + values[1]) / 2)
    return means


def unipc_step(
    x: Tensor, past: list[tuple[Point, Tensor]], s: Point, new: tuple[Point, Tensor] | None = None
) -> Tensor:
    """UniP of order len(past) from past[0] to s; with `new`, the prediction at s itself, UniC of the same order."""
    t, x0 = past[0]
    h = s.lam - t.lam
    others = past[1:] + ([new] if new is not None else [])
    r = [(q.lam - t.lam) / h for q, _ in others]
    middle = x0
    if len(r) == 1:  # any weight is second order as h -> 0; 1/2 is the paper's
        middle = x0 + (others[0][1] - x0) / (2 * r[0])
    elif r:
        # sum_k w_k r_k^(j-1) = j! h^j phi_{j+1}(h) / B(h), eq. 5
        phi, b = torch.expm1(-h) / -h - 1, []
        for j in range(1, len(r) + 1):
            b.append(math.factorial(j) * phi / torch.expm1(-h))
            phi = phi / -h - 1 / math.factorial(j + 1)
        powers = torch.stack([torch.stack(r) ** j for j in range(len(r))])
        w = torch.linalg.solve(powers, torch.stack(b))
        middle = x0 + sum(w[k] / r[k] * (other - x0) for k, (_, other) in enumerate(others))
    return move(x, middle, t, s)


def churn(
    x: Tensor, t: Point, path: Path, randn: Randn, s_churn: float, window: tuple[float, float], s_noise: float
) -> tuple[Tensor, Point]:
    """EDM Algorithm 2, lines 4-6: add noise, going back from rho to (1 + gamma) rho, where rho is in the window."""
    gamma = min(s_churn, math.sqrt(2) - 1)
    if gamma <= 0 or not window[0] <= float(t.rho) <= window[1]:
        return x, t
    hat = point(path, path.time(t.lam - math.log1p(gamma)))
    keep = torch.where(t.alpha > 0, hat.alpha / t.alpha, 1.0)
    fresh = (hat.sigma**2 - (keep * t.sigma) ** 2).clamp(min=0).sqrt()
    return keep * x + s_noise * fresh * randn(x), hat
