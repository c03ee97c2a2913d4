"""How far a set of drawn pictures lies from a set of true ones, in a space of features.

    Frechet:  d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))      (Heusel et al. 2017, eq. 6)
    KID:      MMD^2 with k(x, y) = (x.y / d + 1)^3, unbiased      (Binkowski et al. 2018, section 4)

The Frechet distance of finite samples is biased upwards, by an amount that depends on the
distribution and falls as 1 / n: figures at different n cannot be compared. ``frechet_limit``
extrapolates to n = infinity (Chong & Forsyth 2020); KID has no bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from ldm.diffusion import stream


class Figure(NamedTuple):
    """A measured number with its 95 % interval.

    Args:
        value: the estimate.
        low, high: its interval.
        n: sample size.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} (95 % interval {self.low:.4g} to {self.high:.4g}, n = {self.n})"


@dataclass(frozen=True)
class Moments:
    """Mean ``d`` and covariance ``d d`` of a set of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of ``n d`` features; the covariance has the divisor n - 1."""
        x, mean = _centred(features)
        return cls(mean, x.T @ x)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance, ``d d``."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * _roots(values) @ vectors.T


def _roots(values: Tensor) -> Tensor:
    """Of eigenvalues ``d``, ascending, that are not negative: what rounding leaves of 0 would have
    a root of its own, 1e-8 of the largest.
    """
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return values.where(values > rounding, 0).sqrt()


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """X, ``n d`` float64, of which X^T X is the covariance, and the mean."""
    n, x = len(features), features.double()
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, not {n}")
    mean = x.mean(0)
    return (x - mean) / (n - 1) ** 0.5, mean


def frechet(drawn: Tensor, truth: Moments) -> float:
    """Squared Frechet distance of Gaussians: that of ``n d`` features, and ``truth``.

    With X^T X = C1 and R = C2^(1/2), tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of
    R X^T X R, or of X C2 X^T where that is smaller. Both are symmetric: no complex root, whatever
    the rank.
    """
    x, mean = _centred(drawn)
    if len(x) < x.shape[1]:
        product = x @ truth.covariance @ x.T
    else:
        seen = x @ truth.root
        product = seen.T @ seen
    cross = _roots(torch.linalg.eigvalsh(product)).sum()
    traces = x.square().sum() + truth.covariance.trace()
    return float((mean - truth.mean).square().sum() + traces - 2 * cross)


def frechet_limit(drawn: Tensor, truth: Moments, seed: int = 0, points: int = 10) -> float:
    """Frechet distance for n -> infinity: the intercept of a line in 1 / n over random subsets.

    Args:
        drawn: features of drawn pictures, ``n d``.
        truth: moments of the true ones.
        seed: of the subsets.
        points: subset sizes, evenly from n / 4 to n.
    """
    n = len(drawn)
    if n < 7:  # of 8 one can be left out, and a quarter of 7 are still 2
        raise ValueError(f"the limit of a Frechet distance needs at least 7 pictures, not {n}")
    draw = stream(seed, "frechet limit", 0)
    sizes = np.linspace(n / 4, n, points).round().astype(int)
    values = [frechet(drawn[torch.from_numpy(draw.permutation(n)[:size])], truth) for size in sizes]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1).convert().coef[0])


def jackknife(values: Tensor, statistic: Callable[[Tensor], float], groups: int = 20) -> Figure:
    """``statistic`` of ``values`` (first axis: independent trials), its interval from leaving out
    one of ``groups`` at a time (Tukey 1958): for what is too dear, or too biased, to bootstrap.
    """
    groups = min(groups, len(values))
    member = torch.arange(len(values)) % groups
    without = np.array([statistic(values[member != g]) for g in range(groups)])
    spread = (groups - 1) / groups * np.square(without - without.mean()).sum()
    half = float(scipy.stats.t.ppf(0.975, groups - 1) * np.sqrt(spread))
    value = statistic(values)
    return Figure(value, value - half, value + half, len(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor) -> Figure:
    """Squared maximum mean discrepancy of ``n d`` and ``m d`` features, by all pairs.

    The interval is that of the U-statistic's linear part (Sutherland et al. 2017): with
    h(i) = mean_j k(x_i, x_j) - mean_j k(x_i, y_j) and its mirror image, the variance is
    4 (var h_x / n + var h_y / m). Where x and y come from one distribution that part vanishes, and
    the interval is too narrow.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least 2 pictures on each side, not {n} and {m}")
    x, y = x.double(), y.double()
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    inner_x = (xx.sum(1) - xx.diagonal()) / (n - 1)
    inner_y = (yy.sum(1) - yy.diagonal()) / (m - 1)
    value = float(inner_x.mean() + inner_y.mean() - 2 * xy.mean())
    spread = (inner_x - xy.mean(1)).var() / n + (inner_y - xy.mean(0)).var() / m
    half = 1.96 * float((4 * spread).sqrt())
    return Figure(value, value - half, value + half, n)


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of drawn pictures within the true manifold, and the reverse."""

    precision: float
    recall: float


def precision_recall(drawn: Tensor, truth: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1, 2).

    A picture lies in a set's manifold if it is no further from some member than that member's k-th
    neighbour in the set.
    """
    if min(len(drawn), len(truth)) <= k:
        raise ValueError(f"a {k}-th neighbour needs more than {k} pictures on each side")
    drawn, truth = drawn.double(), truth.double()
    between = torch.cdist(drawn, truth)

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the nearest is the picture itself

    precision = (between <= radii(truth)[None]).any(1).double().mean()
    recall = (between <= radii(drawn)[:, None]).any(0).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0, draws: int = 1000
) -> Figure:
    """``statistic`` of ``values`` (first axis: independent trials) with its percentile interval.

    Args:
        values: ``n *shape``.
        statistic: of each of several sets, ``sets n *shape`` -> ``sets``.
        seed: of what is drawn.
        draws: sets of ``n`` that are drawn out of ``values``.
    """
    n, draw, again = len(values), stream(seed, "bootstrap", 0), []
    for first in range(0, draws, 100):  # a hundred at once, or many pictures fill the memory
        rows = draw.integers(0, n, (min(100, draws - first), n))
        again.append(statistic(values[torch.from_numpy(rows)]))
    low, high = np.quantile(torch.cat(again).numpy(), [0.025, 0.975])
    return Figure(float(statistic(values[None])), float(low), float(high), n)


def mean(values: Tensor) -> Figure:
    """Mean of ``n`` independent values with its interval from the standard error."""
    n, x = len(values), values.double()
    half = 1.96 * float(x.std()) / n**0.5 if n > 1 else float("nan")
    return Figure(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, n)
