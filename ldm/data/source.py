"""Where pictures and captions come from.

A source is a finite, ordered list of examples. Everything about an example but its pixels is known
up front, so that a run can be planned (splits, orders, caches) without opening a single picture;
the pixels are read on demand.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ldm.data.captions import Grammar


@dataclass(frozen=True)
class Example:
    """One picture of a source.

    Args:
        key: unique and stable within its source (``"twemoji/1f34e"``, a relative file name).
        captions: at least one; evaluation uses the first, training draws one per use.
        held_out: never trained on.
    """

    key: str
    captions: tuple[str, ...]
    held_out: bool


class Problem(NamedTuple):
    """A picture or a row that cannot be trained on.

    Args:
        key: of the picture, or where the row stands.
        reason: what such pictures or rows are, and behind "; " what to do, so that equal ones can
            be counted: "pictures without a caption; caption or remove them".
    """

    key: str
    reason: str


class Source(Protocol):
    """A list of examples and a way to their pixels."""

    examples: Sequence[Example]

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with: a path, or its kind."""
        ...

    weight: float | None
    """Share of the draws in proportion to the other sources'; None: its number of pictures."""

    grammar: Grammar | None
    """What becomes of a caption at every use; None: nothing."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What was meant to be an example and cannot be one."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, in pixels, int32 ``n 2``."""
        ...

    @property
    def held_out(self) -> np.ndarray:
        """Which examples are held out, bool ``n``."""
        ...

    @property
    def shards(self) -> np.ndarray | None:
        """Number of what each picture is read from together with its neighbours (a tar, a row
        group), ascending, ``n``; None where each lies for itself.
        """
        ...

    def load(self, index: int) -> Image.Image:
        """The picture of ``examples[index]`` in its own size and mode. Raises ``DataError`` if it
        cannot be read.
        """
        ...

    def digest(self, index: int) -> str:
        """Hex SHA-256 of what the picture is made from: equal digests are equal pictures."""
        ...

    @property
    def digests(self) -> np.ndarray:
        """The same of every example, as bytes, uint8 ``n 32``."""
        ...

    def caption(self, index: int, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        ...

    def captions(self, index: int) -> Sequence[str] | None:
        """Every text that ``caption`` can return, or None if they vary endlessly."""
        ...


@runtime_checkable
class Contrary(Protocol):
    """A source that also knows texts which its pictures are easily mistaken for."""

    def contrary(self, index: int, draw: np.random.Generator) -> str | None:
        """A drawn text that says of picture ``index`` what is false, in the words of the caption
        that the same draw gives; None where none is known.
        """
        ...


class SourceGroup:
    """What configs have in common that stand for several sources, each with its own weight."""

    @cached_property
    def sources(self) -> Sequence[Source]:
        """The sources, in order. Raises ``DataError`` if they cannot be told."""
        raise NotImplementedError


class Drawn:
    """What sources have in common whose pictures are drawn by code: ``size`` high, and as wide
    unless they say ``width``.
    """

    examples: Sequence[Example]
    problems: Sequence[Problem] = ()
    shards: np.ndarray | None = None
    grammar: Grammar | None = None
    size: int
    width: int | None = None
    kind: str

    @property
    def name(self) -> str:
        """Its kind."""
        return self.kind

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, int32 ``n 2``."""
        one = np.array([self.width or self.size, self.size], np.int32)
        return np.tile(one, (len(self.examples), 1))

    @cached_property
    def held_out(self) -> np.ndarray:
        """Which examples are held out, bool ``n``."""
        return np.array([example.held_out for example in self.examples], bool)

    def digest(self, index: int) -> str:
        """Hex SHA-256 of what the picture is made from."""
        raise NotImplementedError

    @property
    def digests(self) -> np.ndarray:
        """The same of every example, as bytes, uint8 ``n 32``."""
        every = b"".join(bytes.fromhex(self.digest(n)) for n in range(len(self.examples)))
        return np.frombuffer(every, np.uint8).reshape(-1, 32)

    def caption(self, index: int, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        captions = self.examples[index].captions
        return captions[0] if draw is None else captions[int(draw.integers(len(captions)))]

    def captions(self, index: int) -> Sequence[str]:
        """Every text that ``caption`` can return."""
        return self.examples[index].captions


def printable(text: str) -> str:
    """``text`` as one line, whatever a name in it holds: no control sequence reaches a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def in_fraction(name: str, fraction: float) -> bool:
    """Whether ``name`` falls into a fixed pseudo-random ``fraction`` of all names, the same on
    every machine.
    """
    return bool(in_fractions([name.encode()], fraction)[0])


def in_fractions(names: Iterable[bytes], fraction: float) -> np.ndarray:
    """``in_fraction`` of many names, bool ``n``."""
    sha256 = hashlib.sha256
    values = np.frombuffer(b"".join([sha256(name).digest()[:8] for name in names]), ">u8")
    if fraction >= 1:  # 2^64 does not fit
        return np.ones(len(values), bool)
    return values < np.uint64(math.ceil(fraction * 2**64))
