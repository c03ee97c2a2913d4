"""One step of ancestral sampling, and the variational bound that is the sum of its terms.

    q(x_s | x_t, x0) = N(on_x_t x_t + on_x0 x0, beta_tilde),   s < t

(Ho et al. 2020, eq. 6 and 7; for any two levels Kingma et al. 2021, appendix A). p(x_s | x_t) has
this mean with x0_hat for x0; its variance is ``beta``, ``beta_tilde``, or learnt between the two,
log variance = v log beta + (1 - v) log beta_tilde (Nichol & Dhariwal 2021, eq. 15).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ldm.diffusion.level import Level, broadcast
from ldm.diffusion.process import NoiseProcess

Variance: TypeAlias = Literal["beta", "beta_tilde"] | Tensor
"""A fixed variance, or the network's v in [-1, 1] (-1 is beta_tilde, 1 is beta; diffusers'
``learned_range``)."""


class Posterior(NamedTuple):
    """q(x_s | x_t, x0), by sample."""

    on_x_t: Tensor
    on_x0: Tensor
    beta: Tensor
    beta_tilde: Tensor

    @staticmethod
    def between(level: Level, before: Level) -> Posterior:
        """From ``level`` (t) to the cleaner ``before`` (s)."""
        ratio, kept = level.alpha / before.alpha, (before.sigma / level.sigma) ** 2
        beta = level.sigma**2 - (ratio * before.sigma) ** 2
        share = before.alpha * beta / level.sigma**2
        return Posterior(ratio * kept, share, beta, beta * kept)

    def log_variance(self, variance: Variance, x: Tensor, least: Tensor) -> Tensor:
        """Log variance of p(x_s | x_t), broadcast against ``x``.

        ``least``: beta_tilde is not taken smaller, since it is 0 in the last step.
        """
        small, large = (
            broadcast(p.log(), x) for p in (self.beta_tilde.clamp(min=least), self.beta)
        )
        if isinstance(variance, str):
            return large if variance == "beta" else small
        share = (variance.to(small.dtype) + 1) / 2
        return share * large + (1 - share) * small


def bound(
    process: NoiseProcess,
    t: Tensor,
    x_t: Tensor,
    x0: Tensor,
    x0_hat: Tensor,
    variance: Variance,
    bins: int | None = None,
) -> Tensor:
    """The term of L_vlb at times ``t``, nats per dimension, ``b``: N times its mean over the nodes,
    and ``prior``, is the whole bound; over log 2 it is in bits.

    KL(q(x_s | x_t, x0) || p(x_s | x_t)), s = t - 1/N; up to t = 1/N -log p(x0 | x_t), of a density,
    or with ``bins`` (256 for pixels in [-1, 1]) of x0's bin (Ho et al. 2020, eq. 13).
    """
    node = 1 / process.num_train_timesteps
    step = Posterior.between(process.level(t), process.level((t.double() - node).clamp(min=0)))
    second = process.level(torch.tensor([2.0, 1.0]).to(t) * node)
    least = Posterior.between(second.map(lambda p: p[0]), second.map(lambda p: p[1])).beta_tilde
    log_p = step.log_variance(variance, x_t, least)
    log_q = broadcast(step.beta_tilde.clamp(min=least).log(), x_t)
    off = (broadcast(step.on_x0, x_t) * (x0_hat - x0)).square()
    kl = ((off + log_q.exp()) / log_p.exp() - 1 + log_p - log_q) / 2
    first = broadcast(t <= node * (1 + 1e-6), x_t) > 0
    return torch.where(first, -_log_density(x0, x0_hat, log_p, bins), kl).flatten(1).mean(1)


def prior(process: NoiseProcess, x0: Tensor) -> Tensor:
    """KL(q(x_1 | x0) || N(0, prior_std^2)), the bound's last term, nats per dimension, ``b``."""
    end, std = process.level(torch.ones(())), process.prior_std()
    ratio = float(end.sigma) / std
    kl = (ratio**2 - 1) / 2 - math.log(ratio) + (float(end.alpha) / std * x0).square() / 2
    return kl.flatten(1).mean(1)


def _log_density(x0: Tensor, mean: Tensor, log_variance: Tensor, bins: int | None) -> Tensor:
    off, std = x0 - mean, (log_variance / 2).exp()
    if bins is None:
        return -((off / std).square() + log_variance + math.log(2 * math.pi)) / 2
    half, far = 1 / (bins - 1), off.abs()
    inner = torch.special.ndtr((half - far) / std) - torch.special.ndtr(-(half + far) / std)
    upper, lower = (torch.special.ndtr((half + side) / std) for side in (-off, off))
    p = torch.where(x0 > 1 - half, upper, torch.where(x0 < half - 1, lower, inner))
    return p.clamp(min=1e-12).log()
