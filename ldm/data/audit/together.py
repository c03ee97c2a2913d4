"""All that a run reads as one source: copies and captions are compared across its sources, too."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
from PIL import Image

from ldm.data.rows import Rows
from ldm.data.source import Example, Problem, Source, SourceGroup
from ldm.errors import DataError


class Together:
    """Sources in order; a key begins with the name of its source if there are several.

    A source that cannot be read as a whole is ``unusable``, and the others are read.

    Args:
        name: what an error about the whole of it begins with.
        kind: for the report.
        given: sources, and groups of them.
    """

    def __init__(self, name: str, kind: str, given: Sequence[Source | SourceGroup]) -> None:
        self.name, self.kind, self.given = name, kind, given
        self.unusable: dict[str, str] = {}
        listed: list[Source] = []
        for one in given:
            try:
                listed += one.sources if isinstance(one, SourceGroup) else [one]
            except DataError as error:
                self.unusable[getattr(one, "name", name)] = str(error)
        self.several = len(listed) + len(self.unusable) > 1
        self.sources: list[Source] = []
        self.labels: list[str] = []
        for source, label in zip(listed, _labels([s.name for s in listed]), strict=True):
            try:
                len(source.examples)
            except DataError as error:
                self.unusable[source.name] = str(error)
            else:
                self.sources.append(source)
                self.labels.append(label)
        self._starts = [0, *accumulate(len(source.examples) for source in self.sources)]

    def _key(self, number: int, key: str) -> str:
        return f"{self.labels[number]}/{key}" if self.several else key

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def examples(self) -> Sequence[Example]:
        """Those of all sources."""
        return _Examples(self)

    @property
    def problems(self) -> list[Problem]:
        """Those of all sources."""
        return [
            Problem(self._key(number, problem.key), problem.reason)
            for number, source in enumerate(self.sources)
            for problem in source.problems
        ]

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, in pixels, int32 ``n 2``."""
        return np.concatenate([s.sizes.reshape(-1, 2) for s in self.sources if len(s.examples)])

    @property
    def held_out(self) -> np.ndarray:
        """Which examples are held out, bool ``n``."""
        return np.concatenate([source.held_out for source in self.sources])

    def find(self, index: int) -> tuple[int, int]:
        """Number of the source that example ``index`` is in, and its place there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - self._starts[number]

    def load(self, index: int) -> Image.Image:
        """The picture of ``examples[index]``. Raises ``DataError`` if it cannot be read."""
        number, place = self.find(index)
        return self.sources[number].load(place)

    def example(self, index: int) -> Example:
        """Example ``index``, its key with the name of its source."""
        number, place = self.find(index)
        found = self.sources[number].examples[place]
        return Example(self._key(number, found.key), found.captions, found.held_out)

    def columns(self) -> tuple[list[str], list[tuple[str, ...]], list[list[bytes]]]:
        """Key and captions of every example; digests, apart for every source."""
        keys, captions, digests = [], [], []
        for number, source in enumerate(self.sources):
            rows = list(_scan(source))
            keys += [self._key(number, key) for key, _, _ in rows]
            captions += [texts for _, texts, _ in rows]
            digests.append([digest for _, _, digest in rows])
        return keys, captions, digests

    def told(self) -> list[dict[str, Any]]:
        """What each source has, for a report of several."""
        return [
            {
                "name": source.name,
                "kind": getattr(source, "kind", self.kind),
                "train": int((~source.held_out).sum()),
                "held_out": int(source.held_out.sum()),
                "weight": None if self.unusable else source.weight,  # which hangs on all of them
            }
            for source in (self.sources if self.several else [])
        ]


class _Examples(Sequence[Example]):
    def __init__(self, together: Together) -> None:
        self._together = together

    def __len__(self) -> int:
        return len(self._together)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._together.example(index % len(self))


def _scan(source: Source) -> Iterator[tuple[str, tuple[str, ...], bytes]]:
    """Key, captions and digest of every example."""
    if isinstance(source.examples, Rows):
        yield from source.examples.scan()
        return
    for index, example in enumerate(source.examples):
        yield example.key, example.captions, bytes.fromhex(source.digest(index))


def _labels(names: Sequence[str]) -> list[str]:
    """Names that tell sources apart: as short as paths can be, numbered where they are equal."""
    if names and all(map(os.path.isabs, names)):
        shared = os.path.commonpath([os.path.dirname(name) for name in names])
        names = [os.path.relpath(name, shared) for name in names]
    counts, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return labels
