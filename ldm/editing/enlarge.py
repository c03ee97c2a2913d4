"""What a second, larger pass is asked for; ``ldm.editing.passes`` draws it."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

LARGEST = 8
"""Times that a side is made larger."""


class Enlarge(NamedTuple):
    """How pictures are drawn again, larger.

    Args:
        scale: of both sides, more than 1.
        strength: of the second pass, 0 to 1.
        by: what is made larger, ``latent`` or ``pixel``.
    """

    scale: float
    strength: float = 0.6
    by: str = "latent"

    @classmethod
    def of(cls, value: Any) -> Enlarge:
        """``value``, a scale, or a tuple of it and of what comes after it.

        Raises:
            ValueError: it is none of these, or one of them does not fit.
        """
        parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if 1 <= len(parts) <= len(cls._fields):
            found = cls(*parts)
            numbers = found.scale, found.strength
            plain = all(isinstance(n, Real) and not isinstance(n, bool) for n in numbers)
            if plain and 1 < found.scale <= LARGEST and 0 <= found.strength <= 1:
                if found.by in ("latent", "pixel"):
                    return found
        raise ValueError(f"more than 1 and at most {LARGEST}, 0 to 1, latent or pixel")
