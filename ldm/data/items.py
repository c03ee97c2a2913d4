"""Pictures of several sources in columns: where each comes from and the shape it is seen at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, overload

import numpy as np
from PIL import Image

from ldm.data.images import Shape
from ldm.data.source import Contrary, Example, Source
from ldm.errors import DataError


class Item(NamedTuple):
    """One picture of a collection: where its example and its pixels are.

    Args:
        source: where it comes from.
        index: its place there.
        shape: width and height at which networks see it.
    """

    source: Source
    index: int
    shape: Shape

    @property
    def example(self) -> Example:
        """Its key and captions."""
        return self.source.examples[self.index]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, upright, in pixels."""
        width, height = self.source.sizes[self.index].tolist()
        return width, height

    def load(self) -> Image.Image:
        """The picture in its own size and mode."""
        return self.source.load(self.index)

    def hint(self) -> Image.Image:
        """The picture that lies beside it, in its own size and mode (``ldm.data.hints``)."""
        hints = getattr(self.source, "beside", None)
        if hints is None:
            raise DataError(f"{self.source.name}: there are no hints")
        return hints.load(self.example.key)

    def digest(self) -> str:
        """Hex SHA-256 of what the picture is made from."""
        return self.source.digest(self.index)

    def caption(self, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        return self.source.caption(self.index, draw)

    def contrary(self, draw: np.random.Generator) -> str | None:
        """A drawn text that is false of the picture, if its source knows any (``Contrary``)."""
        if isinstance(self.source, Contrary):
            return self.source.contrary(self.index, draw)
        return None


class Items(Sequence[Item]):
    """Items as columns of numbers.

    Args:
        sources: all of the collection.
        source: number of each item's source, ``n``.
        index: its place there, ``n``.
        shapes: width and height at which networks see it, ``n 2``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        source: np.ndarray,
        index: np.ndarray,
        shapes: np.ndarray,
    ) -> None:
        self.sources, self.source, self.index, self.shapes = sources, source, index, shapes

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        width, height = self.shapes[number].tolist()
        source = self.sources[int(self.source[number])]
        return Item(source, int(self.index[number]), (width, height))

    def shards(self) -> np.ndarray:
        """Number of the shard of each item among those of all sources, ascending in the order of
        the items, ``n``; a source without shards is one.
        """
        found = np.zeros(len(self), np.int64)
        first = 0
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self.source == number)
            if len(mine) and source.shards is not None:
                found[mine] = first + source.shards[self.index[mine]]
            elif len(mine):
                found[mine] = first
            first = found[mine[-1]] + 1 if len(mine) else first
        return found

    def where(self, chosen: np.ndarray) -> Items:
        """Those for which ``chosen`` (bool, ``n``) is true."""
        return Items(self.sources, self.source[chosen], self.index[chosen], self.shapes[chosen])

    def by_shape(self) -> list[tuple[Shape, np.ndarray]]:
        """Every shape, in order, with the numbers of its items."""
        wide, high = self.shapes.astype(np.int64).T
        packed, which = np.unique(wide << 32 | high, return_inverse=True)
        return [
            ((shape >> 32, shape & 0xFFFFFFFF), np.flatnonzero(which == number))
            for number, shape in enumerate(packed.tolist())
        ]

    def distinct(self) -> Items:
        """The first of those that are made from the same picture, in order."""
        digests = np.empty((len(self), 32), np.uint8)
        for number, source in enumerate(self.sources):
            mine = self.source == number
            if mine.any():
                digests[mine] = source.digests[self.index[mine]]
        _, first = np.unique(digests.view("S32")[:, 0], return_index=True)
        chosen = np.zeros(len(self), bool)
        chosen[first] = True
        return self if chosen.all() else self.where(chosen)


class Planned(Protocol):
    """The pictures of a run by position."""

    def __getitem__(self, position: int) -> Item:
        """The item at ``position``, counted in images from the start of the run."""
        ...


T = TypeVar("T")


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` (all, if there are fewer) at even distances, the same every time."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
