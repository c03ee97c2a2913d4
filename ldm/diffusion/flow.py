"""The probability-flow ODE: noise becomes data, and back, without a draw.

    dx_t = x0_hat d alpha + eps_hat d sigma

(Song et al. 2021, eq. 13, with g and f written out). In the coordinates

    x = x_t / sqrt(alpha^2 + sigma^2),   phi = atan(sigma / alpha),
    dx / d phi = eps_hat cos(phi) - x0_hat sin(phi)

all processes are one, variance preserving, with nothing infinite at either end: 0 is data, pi / 2
noise alone (Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition, Predictor
from ldm.diffusion.level import Level
from ldm.diffusion.process import NoiseProcess

Flow: TypeAlias = Callable[[float, Tensor], Tensor]
"""(phi, x ``b ...``) -> dx / d phi, ``b ...``."""


def angle(level: Level) -> float:
    """Phi of a scalar level, radians."""
    return math.atan2(float(level.sigma), float(level.alpha))


def size(level: Level) -> float:
    """sqrt(alpha^2 + sigma^2) of a scalar level."""
    return math.hypot(float(level.alpha), float(level.sigma))


def when(process: NoiseProcess, phi: float) -> Tensor:
    """The time at which the process has this angle, a float64 scalar."""
    return process.time_at(-2 * torch.tensor(math.tan(phi), dtype=torch.float64).log())


def flow(process: NoiseProcess, predict: Predictor, cond: Condition) -> Flow:
    """The ODE of ``predict``, at any angle between those of the process's nodes."""

    def slope(phi: float, x: Tensor) -> Tensor:
        t = when(process, phi)
        level, timestep = process.level(t), process.timestep(t).float().to(x.device)
        prediction = predict(x * size(level), level, timestep, cond)
        return prediction.eps * math.cos(phi) - prediction.x0 * math.sin(phi)

    return slope
