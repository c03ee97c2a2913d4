"""Pictures under other captions than their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.data.source import Source


class FixedCaptions:
    """A ``Source`` in which every picture has the same captions.

    Args:
        source: the pictures.
        captions: all of a picture's captions; the first is that of evaluation.
    """

    def __init__(self, source: Source, captions: Sequence[str]) -> None:
        self._source, self._captions = source, captions

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also asked for while a worker's copy is empty
            raise AttributeError(name)
        return getattr(self._source, name)

    def caption(self, index: int, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        return self._captions[0 if draw is None else int(draw.integers(len(self._captions)))]

    def captions(self, index: int) -> Sequence[str]:
        """All of them."""
        return self._captions

    def contrary(self, index: int, draw: np.random.Generator) -> None:
        """Of other captions none is known."""
