"""Distances between sets of pictures against closed forms, scipy, and their own intervals."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ldm.evaluation.distances import (
    Moments,
    bootstrap,
    frechet,
    frechet_limit,
    jackknife,
    kid,
    mean,
    precision_recall,
)
from ldm.evaluation.retrieval import Proportion


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_frechet_equals_the_closed_form_of_commuting_gaussians() -> None:
    # d^2 = sum (m1 - m2)^2 + sum (s1 - s2)^2 where the covariances share their axes.
    axes = torch.linalg.qr(normal(6, 6)).Q
    one, other = torch.arange(1.0, 7).double(), torch.tensor([2.0, 0, 3, 1, 5, 4]).double()
    # Mean 0 and covariance 1 to the last digit: columns orthogonal to (1 ... 1) and each other.
    columns = torch.cat([torch.ones(9, 1).double(), normal(9, 6)], 1)
    white = 8**0.5 * torch.linalg.qr(columns).Q[:, 1:]
    drawn = white @ (axes * one @ axes.T)
    y = Moments(torch.full((6,), 0.5).double(), axes * other**2 @ axes.T)
    expected = 6 * 0.25 + float((one - other).square().sum())
    assert frechet(drawn, y) == pytest.approx(expected, rel=1e-9)
    assert frechet(drawn, Moments.of(drawn)) == pytest.approx(0, abs=1e-9)


def test_frechet_equals_scipy_on_correlated_features_even_without_full_rank() -> None:
    for n in (200, 12):  # 12 pictures of 20 features: both covariances are singular
        x, y = normal(n, 20) @ normal(20, 20, seed=1), normal(n, 20, seed=2) + 1
        a, b = Moments.of(x), Moments.of(y)
        root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
        expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()
        assert frechet(x, b) == pytest.approx(float(expected) - 2 * np.trace(root), rel=1e-4)


def test_frechet_is_biased_and_its_limit_is_not() -> None:
    truth = Moments(torch.zeros(16).double(), torch.eye(16).double())
    plain, limits, covered = [], [], 0
    for seed in range(20):
        x = normal(400, 16, seed=seed) + 0.1  # d^2 = 16 * 0.01
        plain.append(frechet(x, truth))
        found = jackknife(x, lambda v: frechet_limit(v, truth))
        limits.append(found.value)
        covered += found.low <= 0.16 <= found.high
    few = jackknife(normal(8, 2), lambda v: frechet_limit(v, Moments.of(normal(9, 2))))
    assert few.n == 8 and few.low < few.value < few.high
    assert np.mean(plain) - 0.16 > 0.15
    assert abs(np.mean(limits) - 0.16) < 0.03
    assert covered >= 16


def test_kid_equals_the_definition_and_is_unbiased() -> None:
    x, y = normal(7, 3), normal(5, 3, seed=1) + 1

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    inside = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    inside += sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 35
    assert kid(x, y).value == pytest.approx(inside - 2 * across, rel=1e-12)
    same = [kid(normal(40, 8, seed=n), normal(40, 8, seed=1000 + n)).value for n in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)


def test_kid_equals_its_closed_form_on_gaussians() -> None:
    # In one dimension E (xy + 1)^3 = E[x^3]E[y^3] + 3 E[x^2]E[y^2] + 3 E[x]E[y] + 1.
    def raw(m: float) -> np.ndarray:  # moments 1 to 3 of N(m, 1)
        return np.array([m, m * m + 1, m**3 + 3 * m])

    binomial = np.array([3, 3, 1])
    expected = float((binomial * (raw(0) - raw(1)) ** 2).sum())
    runs = [kid(normal(500, 1, seed=n), normal(500, 1, seed=500 + n) + 1) for n in range(40)]
    values = [run.value for run in runs]
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(40)
    covered = np.mean([run.low <= expected <= run.high for run in runs])
    assert covered > 0.85


def test_precision_and_recall_of_sets_that_overlap_by_half() -> None:
    truth = torch.stack([torch.arange(100.0), torch.zeros(100)], 1)
    drawn = truth + torch.tensor([50.0, 0.0])
    found = precision_recall(drawn, truth)
    # 50 of 100 coincide; a third neighbour at a border reaches 3 further.
    assert found.precision == pytest.approx(0.53, abs=0.011)
    assert found.recall == pytest.approx(0.53, abs=0.011)
    assert precision_recall(truth, truth) == (1, 1)
    far = precision_recall(truth + 1000, truth)
    assert far == (0, 0)
    narrow = precision_recall(truth[:10], truth)
    assert narrow.precision == 1 and narrow.recall < 0.15


def test_intervals_cover_what_they_should() -> None:
    inside = [0, 0, 0]
    for seed in range(200):
        x = normal(60, seed=seed) + 2
        figures = [mean(x), bootstrap(x, lambda v: v.mean(1), seed, draws=100)]
        hits = int((np.random.default_rng(seed).random(60) < 0.8).sum())
        for n, found in enumerate(figures):
            inside[n] += found.low <= 2 <= found.high
        share = Proportion.of(hits, 60)
        inside[2] += share.low <= 0.8 <= share.high
    for count in inside:
        assert 0.91 <= count / 200 <= 0.98


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        Moments.of(normal(1, 3))
    with pytest.raises(ValueError, match="at least 2 pictures"):
        kid(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="at least 7 pictures"):
        frechet_limit(normal(6, 2), Moments.of(normal(9, 2)))
