"""Distances between features: values known by hand, torch-fidelity's own, and what is known to go wrong."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from ldm.evaluation import distances
from ldm.util import UserError
from tests.evaluation.memory import Largest


def normal(n, d=8, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) * scale + shift).astype(np.float32)


def fid(a, b):
    return distances.frechet_distance(distances.moments(a), distances.moments(b))


def theirs(a, b):
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    return fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |m - n|^2 + sum (s - t)^2."""
    a, b = normal(200_000, 2), normal(200_000, 2, seed=1, shift=3.0, scale=2.0)
    assert fid(a, b) == pytest.approx(2 * 9 + 2 * 1, rel=0.02)


@pytest.mark.parametrize("d", [3, 64])
def test_frechet_distance_is_torch_fidelity_s(d):
    mix = np.random.default_rng(5).standard_normal((d, d)).astype(np.float32)
    a, b = normal(500, d) @ mix, normal(700, d, seed=1, shift=0.1, scale=1.2) @ mix
    assert fid(a, b) == pytest.approx(theirs(a, b), rel=1e-5)


def test_identical_sets_are_at_distance_zero():
    a = normal(300, 64)
    assert abs(fid(a, a.copy())) < 1e-3
    few = normal(20, 64)  # fewer pictures than features: a singular covariance
    assert abs(fid(few, few.copy())) < 1e-3


def test_moments_do_not_depend_on_the_batches():
    x = torch.from_numpy(normal(1000, 5))
    whole, parts = distances.Moments(5).add(x), distances.Moments(5)
    for part in x.split(17):
        parts.add(part)
    assert torch.allclose(whole.mean, parts.mean) and torch.allclose(whole.covariance, parts.covariance)
    assert torch.allclose(whole.covariance, torch.cov(x.double().T))


def test_statistics_of_one_batch_would_be_noticed():
    """The mistake of taking the last batch for the whole set: far from the distance of the whole."""
    a, b = normal(2000, 32), normal(2000, 32, seed=1)
    one = distances.Moments(32).add(torch.from_numpy(a[:64]))
    assert distances.frechet_distance(one, distances.moments(b)) > 5 * fid(a, b)


def test_one_picture_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 pictures, got 1"):
        fid(normal(1), normal(5))


def test_kernel_distance_of_equal_and_other_distributions():
    a, b, c = normal(400), normal(400, seed=1), normal(400, seed=2, shift=1.0)
    same, other = distances.kernel_distance(a, b, 200), distances.kernel_distance(a, c, 200)
    assert abs(same["kid"]) < 0.05 < 1 < other["kid"]
    assert distances.kernel_distance(a, b)["kid_subset"] == 400  # not more than there are


def test_inception_score_of_sure_and_of_clueless_logits():
    sure = np.eye(10, dtype=np.float32)[np.arange(1000) % 10] * 100
    assert distances.inception_score(sure)["is"] == pytest.approx(10, rel=0.05)
    assert distances.inception_score(np.zeros((100, 10), np.float32))["is"] == pytest.approx(1)


def test_precision_and_recall_of_half_a_distribution():
    """Pictures of one of two modes: all of them are real ones, half of the real ones are found."""
    left, right = normal(500, 4), normal(500, 4, seed=1, shift=100)
    real = np.concatenate([left, right])
    drawn = normal(500, 4, seed=2)
    found = {**distances.precision_recall(drawn, real), **distances.density_coverage(drawn, real)}
    assert found["precision"] > 0.9 and found["recall"] == pytest.approx(0.5, abs=0.06)
    assert found["coverage"] == pytest.approx(0.5, abs=0.06) and found["density"] == pytest.approx(1, abs=0.25)


def naive_density_coverage(a, b, k):
    """Naeem et al. 2020, word for word."""
    real = np.linalg.norm(b[:, None] - b[None], axis=2)
    radii = np.sort(real, 1)[:, k]
    within = np.linalg.norm(b[:, None] - a[None], axis=2) <= radii[:, None]
    return within.sum() / (k * len(a)), within.any(1).mean()


def test_density_and_coverage_are_the_paper_s(monkeypatch):
    a, b = normal(90, 3), normal(110, 3, seed=1, scale=1.3)
    expected = naive_density_coverage(a, b, 5)
    for block in (7, 2048):
        monkeypatch.setattr(distances, "BLOCK", block)
        found = distances.density_coverage(a, b)
        assert (found["density"], found["coverage"]) == pytest.approx(expected, abs=0.01)


def test_diversity_is_the_ratio_of_spreads():
    a, b = normal(4000), normal(4000, seed=1, scale=2)
    assert distances.diversity(distances.moments(a), distances.moments(b)) == pytest.approx(0.5, rel=0.03)


def test_too_few_pictures_for_neighbours():
    with pytest.raises(UserError, match="3 neighbours need more than 3 pictures"):
        distances.precision_recall(normal(3), normal(50))


def test_memory_maps_are_taken_as_they_are(tmp_path):
    a, b = normal(300), normal(300, seed=1, shift=0.5)
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert fid(mapped, b) == pytest.approx(fid(a, b))
    assert distances.precision_recall(mapped, b) == distances.precision_recall(a, b)
    assert distances.kernel_distance(mapped, b) == distances.kernel_distance(a, b)


# --- against torch-fidelity, block by block ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 10, 503])
@pytest.mark.parametrize("block", [16, 2048])
def test_inception_score_is_torch_fidelity_s_whatever_the_blocks(n, block, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    logits = normal(n, 12, scale=4)
    theirs = isc_features_to_metric(torch.from_numpy(logits), min(10, n), True, 2020)
    ours = distances.inception_score(logits)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("block", [16, 2048])
def test_precision_and_recall_are_torch_fidelity_s_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    a, b = normal(203), normal(151, seed=1, shift=0.4, scale=1.3)
    theirs = calculate_precision_recall_full(torch.from_numpy(a), torch.from_numpy(b))
    found = distances.precision_recall(a, b)
    assert (found["precision"], found["recall"]) == pytest.approx(theirs) and 0 < theirs[1] < theirs[0]


MEASURES = {
    "fid": fid,
    "prc": distances.precision_recall,
    "dc": distances.density_coverage,
    "is": lambda a, b: distances.inception_score(a, splits=2),
}


@pytest.mark.parametrize("name", MEASURES)
def test_memory_does_not_grow_with_the_number_of_pictures(name, monkeypatch, tmp_path):
    """But for a few numbers a picture: four times the pictures, blocks of the same size."""
    monkeypatch.setattr(distances, "BLOCK", 32)
    np.save(tmp_path / "f.npy", normal(2400, 48))
    largest, peaks = [], []
    for n in (600, 2400):
        x = np.load(tmp_path / "f.npy", mmap_mode="r")[:n]
        tracemalloc.start()  # numpy tells it what it takes
        with Largest() as seen:
            MEASURES[name](x, x)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        largest.append(seen.elements)
    assert largest[1] <= max(48 * 48, 32 * (32 + 6), 2400)  # a block of distances, a covariance, a number a picture
    assert peaks[1] - peaks[0] < 6 * 8 * (2400 - 600) + 20_000  # 48 numbers a picture would be 345 kB


# --- torch-fidelity 0.4.0's own tests that need no weights ------------------------------------------------------------


@pytest.mark.parametrize("block", [50, 2048])
def test_the_convention_of_precision_and_recall_is_theirs(block, monkeypatch):
    """tests/torch_pure/misc/test_prc_convention.py: collapsed pictures in wide data, precision > 0.8, recall < 0.3."""
    monkeypatch.setattr(distances, "BLOCK", block)
    rng = torch.Generator().manual_seed(42)
    drawn, real = torch.randn(200, 16, generator=rng) * 0.1, torch.randn(200, 16, generator=rng) * 3.0
    found = distances.precision_recall(drawn, real)
    assert found["precision"] > 0.8 and found["recall"] < 0.3
    full = calculate_precision_recall_full(drawn, real)
    assert (found["precision"], found["recall"]) == pytest.approx(full, abs=1e-6)


STATISTICS = [(4, 4, 1), *((2**i, 2**j, 2023) for i in (1, 4, 8, 12) for j in (1, 4, 8))]


@pytest.mark.parametrize(("n", "dims", "seed"), STATISTICS)
def test_fid_of_their_statistics(n, dims, seed):
    """tests/torch_pure/misc/test_fid_stats_fn.py: equal to their function, and to the root of the matrix, to 5 places.

    Four features of four pictures with seed 1 gave NaN in one of their versions.
    """
    rng = np.random.RandomState(seed)
    x, y = (torch.tensor(rng.randn(n, dims)) for _ in range(2))
    ours = distances.frechet_distance(*(distances.Moments(dims).add(f) for f in (x, y)))
    # roots of eigenvalues that are 0 but for rounding: a sum over hundreds of dimensions is less exact
    assert ours == pytest.approx(theirs(x.numpy(), y.numpy()), abs=1e-5, rel=1e-12 if n > dims else 1e-6)
    if n > dims:  # else the product is singular, and its root not unique
        c, d = (np.cov(f.numpy(), rowvar=False) for f in (x, y))
        means = float(((x.mean(0) - y.mean(0)) ** 2).sum())
        assert ours == pytest.approx(means + np.trace(c + d - 2 * sqrtm(c @ d).real), abs=1e-5)
