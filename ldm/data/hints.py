"""Hints: pictures that lie beside those of a source and say something of each, edges or a depth.

They have the names of the pictures, whatever the suffix, and are seen as those are: cut, scaled and
mirrored alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.index import Part, index
from ldm.data.items import Items
from ldm.data.names import composed
from ldm.data.picture import READABLE, decode
from ldm.data.rows import Row, Rows
from ldm.errors import DataError


class Hints:
    """The pictures below a folder, by their names.

    Args:
        root: the folder.
        files: bytes and time of change of all that is below it, by path.

    Raises:
        DataError: two have the same name.
    """

    def __init__(self, root: Path, files: Mapping[str, tuple[int, int]]) -> None:
        self.root = root
        keys = sorted(key for key in files if key.lower().endswith(READABLE))
        part = Part(
            path=str(root.resolve()),
            settings="hints",
            files=[(key, *files[key]) for key in keys],
            rows=lambda: [Row(key, ("hint",), (*files[key], 0)) for key in keys],
            read=partial(_read, root),
            reusable=True,
        )
        self.rows = Rows([index(part)], 0.0)
        self._numbers: dict[str, int] = {}
        for number in range(len(self.rows)):
            name = _name(self.rows.key(number))
            if name in self._numbers:
                twice = self.rows.key(self._numbers[name]), self.rows.key(number)
                raise DataError(f"{root}: {twice[0]} and {twice[1]} have one name; keep one")
            self._numbers[name] = number

    def number(self, key: str) -> int | None:
        """Of the hint of the picture ``key``; None: there is none that can be read."""
        return self._numbers.get(_name(key))

    def load(self, key: str) -> Image.Image:
        """The hint of the picture ``key``, upright and in sRGB.

        Raises:
            DataError: there is none, or it cannot be read any more.
        """
        number = self.number(key)
        if number is None:
            raise DataError(f"{self.root} holds no hint for the picture {key}")
        file = self.root / self.rows.key(number)
        try:
            return decode(file.read_bytes(), str(file))
        except OSError as error:
            raise DataError(f"{file}: the hint cannot be read ({error.strerror})") from error

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all names and pictures."""
        found = hashlib.sha256()
        for key, _, digest in self.rows.scan():
            found.update(f"{key}\n".encode() + digest)
        return found.hexdigest()


def beside(source: Any) -> Hints | None:
    """The hints of a source, if it has some."""
    return getattr(source, "beside", None)


def check(every: Sequence[Items]) -> None:
    """Whether all pictures have a hint of their shape.

    Raises:
        DataError: one has none; the message names it.
    """
    for items in every:
        for number in np.unique(items.source):
            source = items.sources[number]
            if (hints := beside(source)) is None:
                raise DataError(
                    f"{source.name}: there are no hints: set data.hints to a folder with a picture"
                    " for each of its own, of the same name"
                )
            for place in items.index[items.source == number].tolist():
                key = source.examples[place].key
                if (found := hints.number(key)) is None:
                    raise DataError(
                        f"{hints.root} holds no hint that can be read for {key}: make one, or leave"
                        " the picture out"
                    )
                (width, height), (wide, high) = source.sizes[place], hints.rows.sizes[found]
                if abs(width * high - wide * height) > max(width, height, wide, high):
                    raise DataError(
                        f"{hints.root / hints.rows.key(found)} has {wide} x {high} pixels, and its"
                        f" picture {width} x {height}: they must have one shape"
                    )


def _name(key: str) -> str:
    return composed(key[: -len(Path(key).suffix)])


def _read(root: Path, row: Row) -> bytes:
    return (root / row.key).read_bytes()
