"""The loss: L = E_{t, eps} [ w(level) |x0 - x0_hat|^2 ].

Weights are declared once, on |x0 - x0_hat|^2, and hold for every target, since an error in y is an
error sigma / d times as large in x0; but the loss is always *computed* in the target's own space,
where it is well conditioned.

    uniform        1 in the target's own space (L_simple, Ho et al. 2020, eq. 14), or in ``space``
    sigma2         snr: sigma^2 |score - score_hat|^2 (Song & Ermon 2019, eq. 6)
    min_snr        min(snr, gamma) (Hang et al. 2023)
    soft_min_snr   snr gamma / (snr + gamma) (Crowson et al. 2024)
    p2             snr / (k + snr)^gamma (Choi et al. 2022)
    elbo           -snr'(t) / 2, the continuous bound (Kingma et al. 2021, eq. 17)
    truncated_snr  max(snr, 1) (Salimans & Ho 2022, section 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.condition import Condition, Denoiser
from ldm.diffusion.level import Level
from ldm.diffusion.names import Target, WeightingName
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.target import Prediction, coefficients, determinant, network_input
from ldm.diffusion.times import TimeSampler, Uniform
from ldm.diffusion.variance import bound


@dataclass(frozen=True)
class Weighting:
    """A weight on |x0 - x0_hat|^2.

    Args:
        kind: see above.
        gamma: of min_snr and soft_min_snr, 5 if None; of p2, 1 if None.
        k: of p2.
        space: of uniform: the target in whose space the weight is 1; None: what the network speaks.
    """

    kind: WeightingName = "uniform"
    gamma: float | None = None
    k: float = 1.0
    space: Target | None = None

    def __call__(self, target: Target, level: Level) -> Tensor:
        """Weight in the space of ``target``, of the level's shape and dtype."""
        d = determinant(target, level)
        if self.kind == "uniform":
            space = target if self.space is None else self.space
            return torch.ones_like(d) if space == target else (determinant(space, level) / d) ** 2
        return self._on_x0(level) * (level.sigma / d) ** 2

    def _on_x0(self, level: Level) -> Tensor:
        if self.kind == "elbo":
            assert level.d_alpha is not None and level.d_sigma is not None
            rate = level.alpha * level.d_sigma - level.sigma * level.d_alpha
            return level.alpha * rate / level.sigma**3
        snr = level.snr
        if self.kind == "sigma2":
            return snr
        if self.kind == "truncated_snr":
            return snr.clamp(min=1)
        if self.kind == "p2":
            return snr / (self.k + snr) ** (1.0 if self.gamma is None else self.gamma)
        gamma = 5.0 if self.gamma is None else self.gamma
        return snr.clamp(max=gamma) if self.kind == "min_snr" else 1 / (1 / snr + 1 / gamma)


class LossTerms(NamedTuple):
    """Per sample, shape ``b``: the loss to minimise, the unweighted mean squared error in target
    space, time, level; the loss without the importance weight of its time; the term of the bound
    where a variance is learnt.
    """

    loss: Float[Tensor, " b"]
    mse: Float[Tensor, " b"]
    t: Float[Tensor, " b"]
    level: Level
    term: Float[Tensor, " b"]
    bound: Float[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Objective:
    """What the network learns; the config *is* the objective.

    Args:
        target: what it predicts.
        weighting: a weight, or its kind.
        gamma: of a weight given by its kind.
        times: which noise levels are trained on.
        learned_variance: the network has twice the channels, of which the second half is v of
            ``ldm.diffusion.variance``; ``bound_weight`` times the bound is added to the loss, in
            which the mean is constant (Nichol & Dhariwal 2021, eq. 16).
        bound_weight: lambda; 0.001 in the paper.
        bins: values of a pixel in [-1, 1] for the bound's first term; None: data are real numbers.
    """

    target: Target = "eps"
    weighting: Weighting | WeightingName = "uniform"
    gamma: float | None = None
    times: TimeSampler = Uniform()
    learned_variance: bool = False
    bound_weight: float = 0.001
    bins: int | None = None

    def weight(self, level: Level) -> Tensor:
        """Weight in target space, of the level's shape and dtype."""
        weighting = self.weighting
        if not isinstance(weighting, Weighting):
            weighting = Weighting(weighting, self.gamma)
        return weighting(self.target, level)

    def __call__(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        z: Float[Tensor, " b *shape"],
        cond: Condition,
        *,
        u: Float[Tensor, " b"],
        eps: Float[Tensor, " b *shape"],
    ) -> LossTerms:
        """Loss per sample. ``z``: clean data ``b ...``; ``u`` in [0, 1) and ``eps`` are given, not
        drawn.
        """
        t, importance = self.times(u, process)
        level = process.level(t)
        wide = level.like(z)
        x_t = process.perturb(z, eps, t)
        out = denoiser(network_input(self.target, x_t, level), process.timestep(t), cond)
        a, b = coefficients(self.target, wide)
        y = a * z + b * eps
        out, v = out.to(y.dtype).chunk(2, 1) if self.learned_variance else (out.to(y.dtype), None)
        mse = (out - y).square().flatten(1).mean(1)
        nats = None
        if v is not None:
            x0_hat = Prediction(x_t, level, out.detach(), self.target).x0
            nats = bound(process, t, x_t, z, x0_hat, v, self.bins)
        return self._terms(process, mse, t, level, importance, nats)

    def _terms(
        self,
        process: NoiseProcess,
        mse: Tensor,
        t: Tensor,
        level: Level,
        importance: Tensor | None = None,
        nats: Tensor | None = None,
    ) -> LossTerms:
        """``mse`` weighted by its level, with the bound, and by ``importance`` where the times
        are to be unbiased.
        """
        term = self.weight(level).to(mse) * mse
        if nats is not None:
            term = term + self.bound_weight * process.num_train_timesteps * nats
        loss = term
        if importance is not None and self.times.unbiased:
            loss = term * importance.to(term)
        return LossTerms(loss, mse, t, level, term, nats)
