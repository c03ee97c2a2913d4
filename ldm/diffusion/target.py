"""What the network predicts: y = a x0 + b eps, with (a, b) a function of the level only.

    x0 (1, 0)   eps (0, 1)   v (-sigma, alpha)   score (0, -1 / sigma)

With x_t = alpha x0 + sigma eps and d = alpha b - sigma a this is one 2x2 system, and its solution

    x0 = (b x_t - sigma y) / d        eps = (alpha y - a x_t) / d

replaces every pairwise conversion. Where d = 0 the target does not determine x0 (eps at zero
terminal SNR). v: Salimans & Ho 2022, appendix D. score: Song et al. 2021, the gradient of log p(x_t
| x0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.level import Level

Target = Literal["x0", "eps", "v", "score"]


def coefficients(target: Target, level: Level) -> tuple[Tensor, Tensor]:
    """(a, b) of ``target`` at ``level``, of the level's shape and dtype."""
    zero, one = torch.zeros_like(level.alpha), torch.ones_like(level.alpha)
    if target == "x0":
        return one, zero
    if target == "eps":
        return zero, one
    if target == "v":
        return -level.sigma, level.alpha
    return zero, -1 / level.sigma


def determinant(target: Target, level: Level) -> Tensor:
    """D = alpha b - sigma a; an error in y is an error sigma / d times as large in x0."""
    a, b = coefficients(target, level)
    return level.alpha * b - level.sigma * a


@dataclass(frozen=True)
class Prediction:
    """A network output ``y`` of kind ``target`` at (``x_t``, ``level``), readable as every other
    target.

    Args:
        x_t: noisy input in the network's coordinates, ``b ...``.
        level: its level, ``b`` or scalar.
        y: the network's output, ``b ...``.
        target: what ``y`` is.
    """

    x_t: Float[Tensor, " b *shape"]
    level: Level
    y: Float[Tensor, " b *shape"]
    target: Target

    @property
    def x0(self) -> Float[Tensor, "b ..."]:
        """The clean data that (x_t, y) imply."""
        return self.as_("x0")

    @property
    def eps(self) -> Float[Tensor, "b ..."]:
        """The noise that (x_t, y) imply."""
        return self.as_("eps")

    def as_(self, target: Target) -> Float[Tensor, "b ..."]:
        """The prediction as ``target``; what the network speaks is handed through untouched."""
        if target == self.target:
            return self.y
        level = self.level.like(self.y)
        x_t, y = self.x_t.to(level.alpha.dtype), self.y.to(level.alpha.dtype)
        a, b = coefficients(self.target, level)
        d = level.alpha * b - level.sigma * a
        x0 = (b * x_t - level.sigma * y) / d
        eps = (level.alpha * y - a * x_t) / d
        a, b = coefficients(target, level)
        return (a * x0 + b * eps).to(self.y.dtype)
