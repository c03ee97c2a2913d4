"""What the network predicts: y = a x0 + b eps, with (a, b) a function of the level only.

    x0 (1, 0)   eps (0, 1)   v (-sigma, alpha)   score (0, -1 / sigma)   velocity (alpha', sigma')
    edm (sigma / s, -alpha s) / sqrt(alpha^2 s^2 + sigma^2),   s = sigma_data

With x_t = alpha x0 + sigma eps and d = alpha b - sigma a this is one 2x2 system, and its solution

    x0 = (b x_t - sigma y) / d        eps = (alpha y - a x_t) / d

replaces every pairwise conversion. Where d = 0 the target does not determine x0 (eps at zero
terminal SNR). v: Salimans & Ho 2022, appendix D. score: Song et al. 2021, the gradient of log p(x_t
| x0). velocity: Liu et al. 2023, eq. 1; Lipman et al. 2023. edm: Karras et al. 2022, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.level import Level, typed
from ldm.diffusion.names import Edm, Target


def coefficients(target: Target, level: Level) -> tuple[Tensor, Tensor]:
    """(a, b) of ``target`` at ``level``, of the level's shape and dtype."""
    if isinstance(target, Edm):
        std = target.std(level)
        return level.sigma / target.sigma_data / std, -level.alpha * target.sigma_data / std
    if target == "v":
        return -level.sigma, level.alpha
    if target == "x0":
        return torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
    if target == "eps":
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)
    if target == "score":
        return torch.zeros_like(level.alpha), -1 / level.sigma
    if level.d_alpha is None or level.d_sigma is None:
        raise ValueError("target 'velocity' needs a level with derivatives, as a process gives it")
    return level.d_alpha, level.d_sigma


def determinant(target: Target, level: Level) -> Tensor:
    """D = alpha b - sigma a; an error in y is an error sigma / d times as large in x0."""
    a, b = coefficients(target, level)
    return level.alpha * b - level.sigma * a


def network_input(target: Target, x_t: Tensor, level: Level) -> Tensor:
    """What a network that speaks ``target`` sees of ``x_t``: c_in x_t for edm, else ``x_t``."""
    return (x_t / target.std(level.like(x_t))).to(x_t) if isinstance(target, Edm) else x_t


class System(NamedTuple):
    """The 2x2 system of a target at a level, whose parts are broadcast against a latent; what
    comes to a level again need not work it out again.
    """

    target: Target
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    d: Tensor

    @classmethod
    def of(cls, target: Target, level: Level, y: Tensor) -> System:
        """That of ``target`` at ``level`` for outputs like ``y``, ``b ...``."""
        if target != "velocity":  # which alone speaks of its rates
            level = Level(level.alpha, level.sigma)
        alpha, sigma, *_ = level = level.like(y)
        a, b = coefficients(target, level)
        return cls(target, alpha, sigma, a, b, alpha * b - sigma * a)

    def x0(self, x_t: Tensor, y: Tensor) -> Tensor:
        """The data that they imply, ``b ...``, in the dtype of the level."""
        dtype = self.alpha.dtype
        return (self.b * typed(x_t, dtype) - self.sigma * typed(y, dtype)) / self.d

    def eps(self, x_t: Tensor, y: Tensor) -> Tensor:
        """The noise that they imply, ``b ...``, in the dtype of the level."""
        dtype = self.alpha.dtype
        return (self.alpha * typed(y, dtype) - self.a * typed(x_t, dtype)) / self.d

    def ends(self, x_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype of ``y``, which stays as it is where it is one of them."""
        return (
            y if self.target == "x0" else typed(self.x0(x_t, y), y.dtype),
            y if self.target == "eps" else typed(self.eps(x_t, y), y.dtype),
        )


@dataclass(frozen=True)
class Prediction:
    """A network output ``y`` of kind ``target`` at (``x_t``, ``level``), readable as every other
    target.

    Args:
        x_t: noisy input ``b ...``, in the coordinates that ``level`` states.
        level: its level, ``b`` or scalar.
        y: the network's output, ``b ...``.
        target: what ``y`` is.
        variance: v in [-1, 1] of a learned variance, ``b ...`` (``ldm.diffusion.variance``).
    """

    x_t: Float[Tensor, " b *shape"]
    level: Level
    y: Float[Tensor, " b *shape"]
    target: Target
    variance: Float[Tensor, " b *shape"] | None = None

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
        system = System.of(self.target, self.level, self.y)
        x0, eps = system.x0(self.x_t, self.y), system.eps(self.x_t, self.y)
        a, b = coefficients(target, self.level.like(self.y))
        return (a * x0 + b * eps).to(self.y.dtype)

    @property
    def ends(self) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """``x0`` and ``eps``, for the work of one."""
        return System.of(self.target, self.level, self.y).ends(self.x_t, self.y)
