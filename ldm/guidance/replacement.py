"""What is known of x0 in place of what the network says of it.

    x0_hat <- m x0_hat + (1 - m) x0      (Song et al. 2021b; Wang et al. 2023)

with m = 1 where a picture is drawn. This is ``LinearInverse(inpainting(1 - m), x0,
method="replacement")`` without a system to solve and without a gradient. A deterministic sampler
that sets out from x_t = alpha x0 + sigma eps where x0 is known stays on that line.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.guidance.chain import moved


@dataclass(frozen=True)
class Replacement:
    """Guidance that leaves what is known as it is.

    Args:
        x0: what is known, ``b c h w``, of any value where it is not.
        drawn: 1 where a picture is drawn, 0 where it is known, ``b 1 h w``.
    """

    x0: Tensor
    drawn: Tensor

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor; ``null`` is not used. No bit changes where all is drawn."""

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            found = predict(x_t, level, timestep, cond)
            return moved(found, (1 - self.drawn) * (self.x0 - found.x0))

        return guided
