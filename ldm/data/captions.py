"""What becomes of a caption between its file and the text encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grammar:
    """Tags, shuffling, wildcards; the config *is* the grammar.

    Args:
        variants: texts drawn once and for all per picture, so that they can be cached; 0 draws a
            new one at every use.
    """

    variants: int = 0

    @property
    def varies(self) -> bool:
        """Whether two draws of one caption can differ."""
        return False

    def plain(self, text: str) -> str:
        """What evaluation sees: nothing drawn."""
        return text

    def draw(self, text: str, draw: np.random.Generator) -> str:
        """What one use of the caption sees."""
        return text
