"""Distances between two sets of features [N, D], and the score of one set of logits [N, K].

The first set is always the generated one, the second the real one. Features may be memory-mapped files: what is held in
memory does not grow with their number, but for a few numbers a picture.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.util import UserError

BLOCK = 2048  # rows of features that are compared at once


def fidelity() -> Any:
    """The package torch_fidelity.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_fidelity
    except ImportError as e:
        raise UserError(f"this metric needs torch-fidelity: pip install -e '.[eval]' ({e})") from e
    return torch_fidelity


# --- Fréchet distance -------------------------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of features that come in batches, in float64; D + D^2 numbers, whatever the number."""

    def __init__(self, dims: int) -> None:
        self.n = 0
        self.total = torch.zeros(dims, dtype=torch.float64)
        self.products = torch.zeros(dims, dims, dtype=torch.float64)

    def add(self, features: Tensor) -> Moments:
        """Takes in features [B, D]."""
        x = features.detach().cpu().double()
        self.n += len(x)
        self.total += x.sum(0)
        self.products += x.T @ x
        return self

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased (divided by n - 1)."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 pictures, got {self.n}")
        mean = self.mean
        return (self.products - self.n * torch.outer(mean, mean)) / (self.n - 1)


def moments(features: np.ndarray | Tensor) -> Moments:
    """Of all rows [N, D]."""
    result = Moments(features.shape[1])
    for start in range(0, len(features), BLOCK):
        result.add(_block(features, start))
    return result


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6).

    The trace of the root is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric: real eigenvalues, in a tenth
    of the time.
    """
    root = _symmetric_root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = eigenvalues.clamp_min(0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * overlap)


def _symmetric_root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


# --- other distances --------------------------------------------------------------------------------------------------


def kernel_distance(a: np.ndarray, b: np.ndarray, subset: int = 1000, seed: int = 2020) -> dict[str, float]:
    """KID (Binkowski et al. 2018): mean and deviation over 100 subsets of the squared MMD with a cubic kernel."""
    fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(subset, len(a), len(b))
    found = kid_features_to_metric(_tensor(a), _tensor(b), kid_subset_size=size, rng_seed=seed, verbose=False)
    return {
        "kid": found["kernel_inception_distance_mean"],
        "kid_std": found["kernel_inception_distance_std"],
        "kid_subset": size,
    }


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> dict[str, float]:
    """exp E KL(p(y | x), p(y)) (Salimans et al. 2016), mean and deviation over the splits of shuffled logits [N, K].

    The order and the splits are torch-fidelity's. E KL is the mean of sum p log p less sum q log q, q being the mean of
    p: sums that grow block by block.
    """
    order = np.random.RandomState(seed).permutation(len(logits))
    splits = min(splits, len(logits))
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(logits, order[start:end]) for start, end in itertools.pairwise(edges)]
    return {"is": float(np.mean(scores)), "is_std": float(np.std(scores))}


def _score(logits: np.ndarray | Tensor, chosen: np.ndarray) -> float:
    total, q = 0.0, torch.zeros(logits.shape[1], dtype=torch.float64)
    for start in range(0, len(chosen), BLOCK):
        p = torch.as_tensor(logits[chosen[start : start + BLOCK]]).double().softmax(1)
        total += float(torch.xlogy(p, p).sum())
        q += p.sum(0)
    q /= len(chosen)
    return math.exp(total / len(chosen) - float(torch.xlogy(q, q).sum()))


def precision_recall(a: np.ndarray, b: np.ndarray, k: int = 3) -> dict[str, float]:
    """Shares of generated pictures among the real ones and the other way round (Kynkaanniemi et al. 2019)."""
    _check_neighbours(a, b, k)
    return {"precision": _share_within(a, b, k), "recall": _share_within(b, a, k)}


def _share_within(x: np.ndarray, support: np.ndarray, k: int) -> float:
    """Share of the rows of x that lie in the ball of any row of the support, which reaches to its k-th neighbour."""
    radii, inside = nearest_distances(support, k), 0
    for start in range(0, len(x), BLOCK):
        rows = _block(x, start)
        hit = torch.zeros(len(rows), dtype=torch.bool)
        for other in range(0, len(support), BLOCK):
            hit |= (torch.cdist(rows, _block(support, other)) <= radii[other : other + BLOCK]).any(1)
        inside += int(hit.sum())
    return inside / len(x)


def density_coverage(a: np.ndarray, b: np.ndarray, k: int = 5) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5): balls around the real pictures only."""
    _check_neighbours(a, b, k)
    radii = nearest_distances(b, k)  # [M]
    inside, covered = 0, 0
    for start in range(0, len(b), BLOCK):
        rows, radius = _block(b, start), radii[start : start + BLOCK, None]
        hit = torch.zeros(len(rows), dtype=torch.bool)
        for other in range(0, len(a), BLOCK):
            within = torch.cdist(rows, _block(a, other)) <= radius
            inside += int(within.sum())
            hit |= within.any(1)
        covered += int(hit.sum())
    return {"density": inside / (k * len(a)), "coverage": covered / len(b)}


def nearest_distances(x: np.ndarray, k: int) -> Tensor:
    """Distance of each row of [N, D] to its k-th nearest other row, [N]."""
    found = []
    for start in range(0, len(x), BLOCK):
        rows = _block(x, start)
        best = rows.new_empty(len(rows), 0)
        for other in range(0, len(x), BLOCK):
            d = torch.cat([best, torch.cdist(rows, _block(x, other))], 1)
            best = d.topk(min(k + 1, d.shape[1]), largest=False).values
        found.append(best.max(1).values)  # the row itself is among the k + 1 nearest
    return torch.cat(found)


def diversity(a: Moments, b: Moments) -> float:
    """Root mean squared distance between two generated pictures over that between two real ones; 1: as the data."""
    return float((a.covariance.trace() / b.covariance.trace()).sqrt())


def _check_neighbours(a: np.ndarray, b: np.ndarray, k: int) -> None:
    if min(len(a), len(b)) <= k:
        raise UserError(f"{k} neighbours need more than {k} pictures of each kind, got {len(a)} and {len(b)}")


def _tensor(x: np.ndarray | Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    with warnings.catch_warnings():  # a memory map opened for reading only: nobody writes to it
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.asarray(x))


def _block(x: np.ndarray | Tensor, start: int) -> Tensor:
    return torch.as_tensor(np.array(x[start : start + BLOCK])).float()
