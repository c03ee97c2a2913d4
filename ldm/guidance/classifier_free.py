"""Classifier-free guidance: y = y_null + scale (y_cond - y_null).

Ho & Salimans 2022, eq. 6, with scale = 1 + w, in the network's own space: eps and v are affine in
x0 with the same x_t on both sides, so the extrapolation means the same for each. Rescale: Lin et
al. 2024, eqs. 15 and 16,

    y <- rescale * y std(y_cond) / std(y) + (1 - rescale) * y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor


def _twice(part: Tensor) -> Tensor:
    return torch.cat([part, part]) if part.ndim and len(part) > 1 else part


@dataclass(frozen=True)
class ClassifierFree:
    """Guidance by the difference between a conditional and an unconditional prediction.

    Args:
        scale: 1 is the plain conditional prediction. As in stock Stable Diffusion a scale <= 1
            means no guidance at
            all: the bare predictor runs, at half the cost, and the null condition is not used.
        rescale: 0 to 1, how far the standard deviation of the result, per sample over all other
            axes, is brought back to that of the conditional prediction.

    """

    scale: float = 7.5
    rescale: float = 0.0

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor: one evaluation of [null, cond] as a batch of ``2b``.

        ``null`` has the length of the batch, or 1. Any number of axes behind the batch.
        """
        if self.scale <= 1:
            return predict

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            many = len(cond)
            nulls = null
            if len(null) == 1 and many > 1:
                nulls = null.map(lambda part: part.expand(many, *part.shape[1:]))
            both = predict(
                torch.cat([x_t, x_t]),
                level.map(_twice),
                _twice(timestep),
                Condition.cat([nulls, cond]),
            )
            y_null, y_cond = both.y.chunk(2)
            y = y_null + self.scale * (y_cond - y_null)
            if self.rescale > 0:
                axes = tuple(range(1, y.ndim))
                std = y_cond.std(dim=axes, keepdim=True) / y.std(dim=axes, keepdim=True)
                y = self.rescale * (y * std) + (1 - self.rescale) * y
            variance = None if both.variance is None else both.variance[len(y) :]
            return Prediction(x_t, level, y, both.target, variance)

        return guided
