"""The loss: L = E_{t, eps} [ w(level) |x0 - x0_hat|^2 ].

Weights are declared once, on |x0 - x0_hat|^2, and hold for every target, since an error in y is an
error sigma / d times as large in x0; but the loss is always *computed* in the target's own space,
where it is well conditioned. ``uniform`` is 1 in that space (L_simple, Ho et al. 2020, eq. 14).
``min_snr`` is min(snr, gamma) (Hang et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.condition import Condition, Denoiser
from ldm.diffusion.level import Level
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.target import Target, coefficients, determinant


class LossTerms(NamedTuple):
    """Per sample, shape ``b``: the weighted loss, the unweighted mean squared error in target
    space, time, level.
    """

    loss: Float[Tensor, " b"]
    mse: Float[Tensor, " b"]
    t: Float[Tensor, " b"]
    level: Level


@dataclass(frozen=True)
class Objective:
    """What the network learns; the config *is* the objective.

    Args:
        target: what it predicts.
        weighting: ``uniform``: 1 in the target's own space; ``min_snr``: min(snr, gamma) on |x0 -
            x0_hat|^2.
        gamma: where min_snr caps; 5 in the paper.
    """

    target: Target = "eps"
    weighting: Literal["uniform", "min_snr"] = "uniform"
    gamma: float = 5.0

    def weight(self, level: Level) -> Tensor:
        """Weight in target space, of the level's shape and dtype."""
        if self.weighting == "uniform":
            return level.alpha * 0 + 1
        return (
            level.snr.clamp(max=self.gamma) * (level.sigma / determinant(self.target, level)) ** 2
        )

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
        level = process.level(u)
        wide = level.like(z)
        x_t = process.perturb(z, eps, u)
        y_hat = denoiser(x_t, process.timestep(u), cond)
        a, b = coefficients(self.target, wide)
        y = a * z + b * eps
        mse = (y_hat.to(y.dtype) - y).square().flatten(1).mean(1)
        return LossTerms(self.weight(level).to(mse) * mse, mse, u, level)
