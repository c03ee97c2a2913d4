"""Classifier-free guidance: y = y_null + scale (y_cond - y_null).

Ho & Salimans 2022, eq. 6, with scale = 1 + w, in the network's own space: eps and v are affine in
x0 with the same x_t on both sides, so the extrapolation means the same for each. Rescale: Lin et
al. 2024, eqs. 15 and 16,

    y <- rescale * y std(y_cond) / std(y) + (1 - rescale) * y.

Interval: Kynkaanniemi et al. 2024. Projection: Sadat et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.diffusion.level import broadcast
from ldm.guidance.chain import moved


def _twice(part: Tensor) -> Tensor:
    return torch.cat([part, part]) if part.ndim and len(part) > 1 else part


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance: x0 = x0_cond + (scale - 1) update.

    The update is x0_cond - x0_null, whose part along x0_cond makes colours too strong, and is
    weakened. It is one sample's own business: lengths and angles are over all its axes.

    Args:
        parallel: what is left of the part along x0_cond (eta); 0 is perpendicular guidance, 1 all.
        radius: greatest length of the difference (r); None: any.
        momentum: of the running sum of differences (beta), negative in the paper.
    """

    parallel: float = 0.0
    radius: float | None = None
    momentum: float = 0.0

    def update(self, x0_cond: Tensor, difference: Tensor) -> Tensor:
        """What is left of ``difference``, ``b ...``."""
        along, gap = (part.flatten(1) for part in (x0_cond, difference))
        if self.radius is not None:
            gap = gap * (self.radius / gap.norm(dim=1, keepdim=True)).clamp(max=1)
        along = along / along.norm(dim=1, keepdim=True)
        gap = gap - (1 - self.parallel) * (gap * along).sum(1, keepdim=True) * along
        return gap.reshape(difference.shape)


@dataclass(frozen=True)
class ClassifierFree:
    """Guidance by the difference between a conditional and an unconditional prediction.

    Args:
        scale: 1 is the plain conditional prediction. As in stock Stable Diffusion a scale <= 1
            means no guidance at
            all: the bare predictor runs, at half the cost, and the null condition is not used.
        rescale: 0 to 1, how far the standard deviation of the result, per sample over all other
            axes, is brought back to that of the conditional prediction.
        interval: least and greatest log(alpha^2 / sigma^2) that is guided; the others cost one
            evaluation. None: all.
        projection: of the difference; None: all of it.

    Raises:
        ValueError: scale or rescale is no finite number.

    """

    scale: float = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    projection: Projection | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("rescale", self.rescale)):
            if not math.isfinite(value):
                raise ValueError(f"guidance: {name} must be a finite number, not {value}")

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor: one evaluation of [null, cond] as a batch of ``2b``.

        ``null`` has the length of the batch, or 1. Any number of axes behind the batch. With a
        momentum it remembers, and serves one call of a sampler.
        """
        if self.scale <= 1:
            return predict
        running: Tensor | None = None
        # The same product as by a number of Python's, in half of the time.
        single = torch.tensor(self.scale, dtype=torch.float32)
        joined: tuple[Condition, Condition] | None = None  # (condition, [null, condition])

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            nonlocal running, joined
            scale: float | Tensor = self.scale
            if self.interval is not None:
                least, most = self.interval
                inside = (least <= level.logsnr) & (level.logsnr <= most)
                if not bool(inside.any()):
                    return predict(x_t, level, timestep, cond)
                scale = broadcast(torch.where(inside, scale, 1.0), x_t)
            # A condition that is told all the way is joined once.
            if joined is None or joined[0] is not cond:
                many, nulls = len(cond), null
                if len(null) == 1 and many > 1:
                    nulls = null.map(lambda part: part.expand(many, *part.shape[1:]))
                joined = cond, Condition.cat([nulls, cond])
            twice = level.map(_twice) if level.alpha.ndim else level
            both = predict(torch.cat([x_t, x_t]), twice, _twice(timestep), joined[1])
            y_null, y_cond = both.y.chunk(2)
            variance = None if both.variance is None else both.variance[len(y_cond) :]
            plain = Prediction(x_t, level, y_cond, both.target, variance)
            if self.projection is None:
                if not isinstance(scale, Tensor) and y_null.dtype == torch.float32:
                    scale = single
                y = y_null + scale * (y_cond - y_null)
            else:
                x0 = plain.x0
                difference = x0 - Prediction(x_t, level, y_null, both.target).x0
                if self.projection.momentum:
                    before = 0.0 if running is None else self.projection.momentum * running
                    difference = difference + before
                    running = difference.detach()
                y = moved(plain, (scale - 1) * self.projection.update(x0, difference)).y
            if self.rescale > 0:
                axes = tuple(range(1, y.ndim))
                std = y_cond.std(dim=axes, keepdim=True) / y.std(dim=axes, keepdim=True)
                y = self.rescale * (y * std) + (1 - self.rescale) * y
            return Prediction(x_t, level, y, both.target, variance)

        return guided
