"""A shift of the clock that goes by the size of a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SizeShift:
    """The shift of a rectified flow at n tokens, the exponential of a line through two points:

        mu(n) = base + (max - base) (n - start) / (stop - start),   shift = exp(mu)

    The line goes on beyond both. It is the exponential ``use_dynamic_shifting`` of diffusers'
    FlowMatchEulerDiscreteScheduler (Flux.1, Black Forest Labs 2024).

    Args:
        base: mu at ``start`` tokens.
        max: mu at ``stop`` tokens.
        start: tokens.
        stop: tokens, more than ``start``.
    """

    base: float = 0.5
    max: float = 1.15
    start: int = 256
    stop: int = 4096

    def __post_init__(self) -> None:
        if not self.start < self.stop:
            raise ValueError(f"shift: from ({self.start}) must be less than to ({self.stop})")

    def mu(self, tokens: int) -> float:
        """The logarithm of the shift at so many tokens."""
        slope = (self.max - self.base) / (self.stop - self.start)
        return tokens * slope + (self.base - slope * self.start)  # in the order of diffusers

    def at(self, tokens: int) -> float:
        """The shift at so many tokens."""
        return math.exp(self.mu(tokens))
