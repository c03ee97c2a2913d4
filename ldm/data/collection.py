"""Several sources as one, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from rich.progress import track

from ldm.data.source import DataError, Example, Source


class Item(NamedTuple):
    """One picture of a collection: its example, and where its pixels are."""

    example: Example
    source: Source
    index: int

    def load(self) -> Image.Image:
        """The picture in its own size and mode."""
        return self.source.load(self.index)

    def digest(self) -> str:
        """Hex SHA-256 of what the picture is made from."""
        return self.source.digest(self.index)

    def caption(self, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        captions = self.example.captions
        return captions[0] if draw is None else captions[int(draw.integers(len(captions)))]


T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` (all, if there are fewer) at even distances, the same every time."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Collection:
    """All items of ``sources``, in order.

    Raises:
        DataError: if nothing is left to train on.
    """

    def __init__(self, sources: Source | Sequence[Source]) -> None:
        every = sources if isinstance(sources, Sequence) else [sources]
        items = [Item(e, source, i) for source in every for i, e in enumerate(source.examples)]
        self.train = [item for item in items if not item.example.held_out]
        self.held_out = [item for item in items if item.example.held_out]
        if not self.train:
            raise DataError(f"data: none of {len(items)} pictures is left to train on")

    def verify(self, *, train: bool) -> None:
        """Reads every held-out picture, and with ``train`` every other, before a run needs them.

        Raises:
            DataError: of the first one that cannot be read.
        """
        for item in track(
            [*self.held_out, *(self.train if train else [])],
            "reading every picture once",
            transient=True,
        ):
            item.load()

    def summary(self) -> str:
        """Hex SHA-256 of what is trained on: keys and captions, in order."""
        digest = hashlib.sha256()
        for item in self.train:
            digest.update(repr((item.example.key, item.example.captions)).encode())
        return digest.hexdigest()

    def captions(self) -> list[str]:
        """Every caption that training can draw, and the one that drops it, without repeats."""
        return list(dict.fromkeys(["", *(c for item in self.train for c in item.example.captions)]))
