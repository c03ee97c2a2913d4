"""The ``ema`` of a run's YAML."""

from __future__ import annotations

from typing import Annotated, Literal

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
        device: where it is kept: None with the weights, ``cpu`` in the host's memory, from which
            every update and every look at the average cost a copy.
        every: steps between two updates, each with the decay of all of them; what is saved in
            between is the average as it was last made.
    """

    half_life: Duration = "50k images"
    ramp: Share = 0.05
    device: Literal["cpu"] | None = None
    every: Annotated[int, Field(gt=0, le=10_000)] = 1

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
