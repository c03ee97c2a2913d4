"""Several sources as one, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar, overload

import numpy as np
from PIL import Image

from ldm.data.rows import Rows
from ldm.data.source import DataError, Example, Problem, Source, SourceGroup


class Item(NamedTuple):
    """One picture of a collection: where its example and its pixels are."""

    source: Source
    index: int

    @property
    def example(self) -> Example:
        """Its key and captions."""
        return self.source.examples[self.index]

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
    """Items as two columns of numbers.

    Args:
        sources: all of the collection.
        source: number of each item's source, ``n``.
        index: its place there, ``n``.
    """

    def __init__(self, sources: Sequence[Source], source: np.ndarray, index: np.ndarray) -> None:
        self.sources, self.source, self.index = sources, source, index

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return Item(self.sources[int(self.source[number])], int(self.index[number]))

    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, int32 ``n 2``."""
        found = np.empty((len(self), 2), np.int32)
        for number, source in enumerate(self.sources):
            mine = self.source == number
            found[mine] = source.sizes[self.index[mine]]
        return found


T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` (all, if there are fewer) at even distances, the same every time."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Collection:
    """All items of ``sources``, in order.

    Args:
        sources: one or several; a group stands for its sources.
        on_bad_sample: ``error`` refuses sources with a picture or row that cannot be used, ``skip``
            leaves those out; they are ``skipped``.

    Raises:
        DataError: nothing is left to train on, or something is bad and may not be skipped.
    """

    def __init__(
        self,
        sources: Source | SourceGroup | Sequence[Source | SourceGroup],
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        given = sources if isinstance(sources, Sequence) else [sources]
        self.sources = list[Source]()
        for source in given:
            self.sources += source.sources if isinstance(source, SourceGroup) else [source]
        held_out = [source.held_out for source in self.sources]
        self.skipped: list[tuple[str, Problem]] = []
        for source in self.sources:
            if source.problems and on_bad_sample == "error":
                raise DataError(describe(source.name, source.problems))
            self.skipped += [(source.name, problem) for problem in source.problems]
        number = np.repeat(np.arange(len(held_out), dtype=np.int16), [len(h) for h in held_out])
        index = np.concatenate([np.arange(len(h)) for h in held_out])
        out = np.concatenate(held_out) if len(held_out) else np.empty(0, bool)
        self.train = Items(self.sources, number[~out], index[~out])
        self.held_out = Items(self.sources, number[out], index[out])
        if not len(self.train):
            raise DataError(f"data: none of {len(index)} pictures is left to train on")

    @property
    def endless(self) -> bool:
        """Whether some captions vary endlessly, so that they cannot all be encoded ahead."""
        return any(
            source.captions(0) is None for source in self.sources if len(source.examples) > 0
        )

    def summary(self) -> str:
        """Hex SHA-256 of what is trained on: keys, captions and pictures of files, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            for keep, entry in zip(~source.held_out, _entries(source), strict=True):
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
    shown = ", ".join(alike[:3]) + (", ..." if len(alike) > 3 else "")
    shown = "".join(c if c.isprintable() else "?" for c in shown)  # one line, whatever the names
    others = len(problems) - len(alike)
    more = f" (and {others} other problems)" if others else ""
    return (
        f"{name}: {len(alike)} {what}: {shown}; {cure}{more}, or set on_bad_sample to skip;"
        f" `ldm data check` lists all"
    )
