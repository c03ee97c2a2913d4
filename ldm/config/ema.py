"""The ``ema`` of a run's YAML."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm.config.loader import Duration, config_class
from ldm.data.ranges import Share


@config_class
class Ema:
    """Exponential moving average of the weights.

    Args:
        half_life: after this many images a weight counts half.
        ramp: the half-life is at most this fraction of the images seen so far (Karras et al. 2022),
            so that a short run is not held back by its random init.
    """

    half_life: Duration = "50k images"
    ramp: Share = 0.05

    @property
    def half_lives(self) -> tuple[str, ...]:
        """The one."""
        return (self.half_life,)


@config_class
class TextToImageEma(Ema):
    """Exponential moving average of the weights; of several the one with the least held-out loss is
    the model, chosen anew at every validation.

    Args:
        half_life: one, or several.
    """

    half_life: Duration | Annotated[tuple[Duration, ...], Field(min_length=1)] = "50k images"

    @property
    def half_lives(self) -> tuple[str, ...]:
        """All of them."""
        return (self.half_life,) if isinstance(self.half_life, str) else self.half_life
