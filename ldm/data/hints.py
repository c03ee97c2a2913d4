"""Hints: pictures that go with those of a source and say something of each, edges or a depth.

They lie beside the pictures, of the same names whatever the suffix, or a column of the source names
them; they are seen as the pictures are: cut, scaled and mirrored alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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

COLUMN = "conditioning_image"
"""What diffusers' training program calls the column of hints."""

NOT_BOTH = (
    "hints and hint_column: set the folder of the hints or the column that has them, not both"
)


class Hints:
    """Pictures, and which of them is that of a picture of the source.

    Args:
        name: of where they are, as messages begin.
        parts: they.
        where: how a message names the one of a key.
        keys: of the hint of each picture, by the picture's; None: they are the same.
        called: what of a key is the same; by default all of it.

    Raises:
        DataError: two have the same name.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        where: Callable[[str], str],
        keys: Mapping[str, str] | None = None,
        called: Callable[[str], str] = str,
    ) -> None:
        self.name, self.where = name, where
        self._parts, self._keys, self._called = parts, keys, called
        self.rows = Rows([index(part) for part in parts], 0.0)
        self._numbers: dict[str, int] = {}
        for number in range(len(self.rows)):
            own = called(self.rows.key(number))
            if own in self._numbers:
                twice = self.rows.key(self._numbers[own]), self.rows.key(number)
                raise DataError(f"{name}: {twice[0]} and {twice[1]} have one name; keep one")
            self._numbers[own] = number

    @classmethod
    def below(
        cls,
        root: Path,
        files: Mapping[str, tuple[int, int]],
        keys: Mapping[str, str] | None = None,
    ) -> Hints:
        """The pictures below a folder: of the names of their pictures, or by ``keys``.

        Args:
            root: the folder.
            files: bytes and time of change of all that is below it, by path.
            keys: of the hint of each picture, by the picture's; None: by their names.

        Raises:
            DataError: two have the same name.
        """
        own = set(files) if keys is None else set(keys.values())
        mine = sorted(key for key in own if key.lower().endswith(READABLE))
        part = Part(
            path=str(root.resolve()),
            settings="hints" if keys is None else "named hints",
            files=[(key, *files[key]) for key in mine],
            rows=lambda: [Row(key, ("hint",), (*files[key], 0)) for key in mine],
            read=partial(_read, root),
            reusable=True,
        )
        called = _name if keys is None else str
        return cls(str(root), [part], lambda key: str(root / key), keys, called)

    def number(self, key: str) -> int | None:
        """Of the hint of the picture ``key``; None: there is none that can be read."""
        own = key if self._keys is None else self._keys.get(key)
        return None if own is None else self._numbers.get(self._called(own))

    def load(self, key: str) -> Image.Image:
        """The hint of the picture ``key``, upright and in sRGB.

        Raises:
            DataError: there is none, or it cannot be read any more.
        """
        number = self.number(key)
        if number is None:
            raise DataError(f"{self.name} holds no hint for the picture {key}")
        own, (part, place) = self.rows.key(number), self.rows.place(number)
        try:
            data = self._parts[part].read(Row(own, (), place))
        except (OSError, DataError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{self.where(own)}: the hint cannot be read ({reason})") from error
        return decode(data, self.where(own))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all names and pictures."""
        found = hashlib.sha256()
        for key, _, digest in self.rows.scan():
            found.update(f"{key}\n".encode() + digest)
        for pair in sorted((self._keys or {}).items()):
            found.update("\n".join(pair).encode())
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
                    " for each of its own, of the same name, or data.hint_column to the column that"
                    f" has them ({COLUMN})"
                )
            for place in items.index[items.source == number].tolist():
                key = source.examples[place].key
                if (found := hints.number(key)) is None:
                    raise DataError(
                        f"{hints.name} holds no hint that can be read for {key}: make one, or leave"
                        " the picture out"
                    )
                (width, height), (wide, high) = source.sizes[place], hints.rows.sizes[found]
                if abs(width * high - wide * height) > max(width, height, wide, high):
                    raise DataError(
                        f"{hints.where(hints.rows.key(found))} has {wide} x {high} pixels, and its"
                        f" picture {width} x {height}: they must have one shape"
                    )


def _name(key: str) -> str:
    return composed(key[: -len(Path(key).suffix)])


def _read(root: Path, row: Row) -> bytes:
    return (root / row.key).read_bytes()
