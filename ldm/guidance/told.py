"""Classifier-free guidance at a scale of each sample's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.diffusion.level import broadcast

SCALE = "guidance"
"""Where a condition tells the scale, ``b``."""


@dataclass(frozen=True)
class ToldScale:
    """y = y_null + scale (y_cond - y_null), the scale being what each condition tells under
    ``SCALE``: what a distilled student is told, its teacher is guided at (Meng et al. 2023, section
    3.1, with scale = 1 + w).
    """

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor: one evaluation of [null, cond] as a batch of ``2b``.

        ``null`` has the length of the batch, or 1; what it does not say (where a picture was cut)
        is that of the condition.
        """

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            many = len(x_t)
            nulls = null.map(lambda part: part.expand(many, *part.shape[1:]))
            nulls = replace(nulls, extra=cond.extra | nulls.extra)
            both = predict(
                torch.cat([x_t, x_t]),
                level.map(lambda part: torch.cat([part, part])),
                torch.cat([timestep, timestep]),
                Condition.cat([nulls, cond]),
            )
            y_null, y_cond = both.y.chunk(2)
            scale = broadcast(cond.extra[SCALE], y_cond).to(y_cond.dtype)
            return Prediction(x_t, level, y_null + scale * (y_cond - y_null), both.target)

        return guided
