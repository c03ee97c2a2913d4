"""Several sources as one, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
from PIL import Image

from ldm.data.images import ImageTransform, Shape
from ldm.data.rows import Rows
from ldm.data.source import DataError, Example, Problem, Source, SourceGroup, printable

TOO_SMALL = (
    "pictures smaller than a step of the buckets; remove them, or set images.buckets.upscale"
)


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

    def digest(self) -> str:
        """Hex SHA-256 of what the picture is made from."""
        return self.source.digest(self.index)

    def caption(self, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        return self.source.caption(self.index, draw)


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

    def where(self, chosen: np.ndarray) -> Items:
        """Those for which ``chosen`` (bool, ``n``) is true."""
        return Items(self.sources, self.source[chosen], self.index[chosen], self.shapes[chosen])


T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` (all, if there are fewer) at even distances, the same every time."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Collection:
    """All items of ``sources``, in order.

    Args:
        sources: one or several; a group stands for its sources.
        transform: what makes pictures of their size into those that networks see.
        on_bad_sample: ``error`` refuses sources with a picture or row that cannot be used, ``skip``
            leaves those out; they are ``skipped``.

    Raises:
        DataError: nothing is left to train on, or something is bad and may not be skipped.
    """

    def __init__(
        self,
        sources: Source | SourceGroup | Sequence[Source | SourceGroup],
        transform: ImageTransform,
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        given = sources if isinstance(sources, Sequence) else [sources]
        self.sources = list[Source]()
        self._grouped: list[Any] = []
        for source in given:
            if isinstance(source, SourceGroup):
                self._grouped += source.sources
            self.sources += source.sources if isinstance(source, SourceGroup) else [source]
        if not self.sources:
            raise DataError("data: there is no source, name at least one")
        for source in self.sources:
            if source.weight is not None and not source.weight >= 0:
                raise DataError(f"{source.name}: weight {source.weight} is no share, set 0 or more")
        self.skipped: list[tuple[str, Problem]] = []
        columns = []
        for number, source in enumerate(self.sources):
            count = len(source.examples)
            shapes = transform.shapes(source.sizes) if count else np.empty((0, 2), np.int32)
            small = [
                Problem(source.examples[int(i)].key, TOO_SMALL)
                for i in np.flatnonzero((shapes == 0).any(1))
            ]
            problems = [*source.problems, *small]
            if problems and on_bad_sample == "error":
                raise DataError(describe(source.name, problems))
            self.skipped += [(source.name, problem) for problem in problems]
            columns.append((np.full(count, number, np.int16), np.arange(count), shapes))
        number, index, shapes = (np.concatenate(part) for part in zip(*columns, strict=True))
        every = Items(self.sources, number, index, shapes)
        out = np.concatenate([source.held_out for source in self.sources]).astype(bool)
        usable = (every.shapes > 0).all(1)
        self.train, self.held_out = every.where(~out & usable), every.where(out & usable)
        if not any(
            source.weight != 0 and (self.train.source == number).any()
            for number, source in enumerate(self.sources)
        ):
            names = ", ".join(source.name for source in self.sources)
            raise DataError(f"{names}: none of {len(every)} pictures is left to train on")

    @property
    def endless(self) -> bool:
        """Whether some captions vary endlessly, so that they cannot all be encoded ahead."""
        return any(
            source.captions(0) is None for source in self.sources if len(source.examples) > 0
        )

    def summary(self) -> str:
        """Hex SHA-256 of what is trained on: keys, captions and pictures of files, in order."""
        digest = hashlib.sha256()
        for number, source in enumerate(self.sources):
            if source in self._grouped:  # its settings stand in a file, not in the config
                digest.update(repr((source.weight, source.grammar)).encode())
            mine = np.zeros(len(source.examples), bool)
            mine[self.train.index[self.train.source == number]] = True
            for keep, entry in zip(mine.tolist(), _entries(source), strict=True):
                if keep:
                    digest.update(repr(entry).encode())
        return digest.hexdigest()

    def captions(self) -> list[str]:
        """Every caption that training can draw (as the files have it, where it varies endlessly),
        and the one that drops it, without repeats.
        """
        found = {"": None}
        for item in self.train:
            texts = item.source.captions(item.index)
            found |= dict.fromkeys(item.example.captions if texts is None else texts)
        return list(found)


def _entries(source: Source) -> Iterator[tuple[object, ...]]:
    if isinstance(source.examples, Rows):
        yield from source.examples.scan()
    else:
        for example in source.examples:
            yield example.key, example.captions


def describe(name: str, problems: Sequence[Problem]) -> str:
    """One line about ``problems`` of one source: how many of the first kind, which, and the
    cure.
    """
    what, _, cure = problems[0].reason.partition("; ")
    alike = [problem.key for problem in problems if problem.reason == problems[0].reason]
    shown = printable(", ".join(alike[:3])) + (", ..." if len(alike) > 3 else "")
    others = len(problems) - len(alike)
    more = f" (and {others} other problems)" if others else ""
    return (
        f"{name}: {len(alike)} {what}: {shown}; {cure}{more}, or set on_bad_sample to skip;"
        f" `ldm data check` lists all"
    )
