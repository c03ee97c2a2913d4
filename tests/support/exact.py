"""Data whose every marginal is known: mixtures of Gaussians, with their exact denoisers.

p(x_t) = sum_k w_k N(alpha m_k, S_k), S_k = alpha^2 C_k + sigma^2 I, and within a component
E[x0 | x_t] = m_k + alpha C_k S_k^{-1} (x_t - alpha m_k); finite for any (alpha, sigma) but (0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor, Target, coefficients


@dataclass(frozen=True)
class Mixture:
    """Weights ``k``, means ``k d``, covariances ``k d d``, all float64."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        off = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs + off[:, :, None] * off[:, None])

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """Variances ``k d`` along the axes ``k d d`` of C_k, which S_k shares."""
        return tuple(torch.linalg.eigh(self.covs))

    def noised(self, alpha: Tensor | float, sigma: Tensor | float) -> Mixture:
        """The distribution of x_t."""
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.covs + sigma**2 * eye)

    def sample(self, count: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=draw)
        z = torch.randn(count, self.means.shape[1], generator=draw, dtype=torch.float64)
        return self.means[which] + torch.einsum(
            "bij,bj->bi", torch.linalg.cholesky(self.covs)[which], z
        )

    def _parts(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """log(w_k N(x; k)) ``k b``, S_k^{-1} (x - alpha m_k) ``k d b``, alpha ``1 1 b``, or of
        one level ``1 1 1``. The samples are last: sums over the few of the rest are fast so.
        """
        alpha, sigma = (p.double().reshape(1, 1, -1) for p in level[:2])
        variances, axes = self._axes
        spread = alpha**2 * variances[..., None] + sigma**2  # of S_k along its axes, k d b or k d 1
        off = x.double().T - alpha * self.means[..., None]
        along = axes.mT @ off
        scaled = along / spread
        log = (
            self.weights.log()[:, None]
            - ((along * scaled).sum(1) + spread.log().sum(1) + x.shape[1] * math.log(2 * math.pi))
            / 2
        )
        return log, axes @ scaled, alpha

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """log p(x_t), nats, ``b``."""
        return self._parts(x, level)[0].logsumexp(0)

    def responsibilities(self, x: Tensor, level: Level) -> Tensor:
        """p(component | x_t), ``b k``."""
        return self._parts(x, level)[0].softmax(0).T

    def score(self, x: Tensor, level: Level) -> Tensor:
        """Gradient of log p(x_t), ``b d``."""
        log, solved, _ = self._parts(x, level)
        return -(log.softmax(0)[:, None] * solved).sum(0).T

    def _hats(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t] = -sigma score, ``b d``."""
        log, solved, alpha = self._parts(x, level)
        share = log.softmax(0)[:, None]
        per = self.means[..., None] + alpha * (self.covs @ solved)
        eps = level.sigma.double().reshape(1, -1) * (share * solved).sum(0)
        return (share * per).sum(0).T, eps.T

    def x0_hat(self, x: Tensor, level: Level) -> Tensor:
        """E[x0 | x_t], ``b d``."""
        return self._hats(x, level)[0]

    def eps_hat(self, x: Tensor, level: Level) -> Tensor:
        """E[eps | x_t], ``b d``."""
        return self._hats(x, level)[1]

    def predictor(self, target: Target) -> Predictor:
        """The exact denoiser, speaking ``target``; levels and times may be scalars."""

        def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            a, b = coefficients(target, level.map(lambda p: p.double().reshape(-1, 1)))
            x0, eps = self._hats(x_t, level)
            y = a * x0 + b * eps
            return Prediction(x_t, level, y.to(x_t.dtype), target)

        return predict


def _mixture(weights: list[float], means: list[list[float]], covs: list[list[list[float]]]):
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in (weights, means, covs)))


GAUSSIAN = _mixture([1.0], [[0.7]], [[[1.44]]])
MIXTURE = _mixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.09]], [[0.25]]])
CORRELATED = _mixture(
    [0.4, 0.6],
    [[-1.2, -0.6], [0.9, 0.8]],
    [[[0.3, 0.18], [0.18, 0.2]], [[0.25, -0.1], [-0.1, 0.4]]],
)
EXACT = {"gaussian": GAUSSIAN, "mixture": MIXTURE, "correlated": CORRELATED}
PURE = Level(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
"""No noise."""
