"""How a source tells that a path holds what it reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ldm.data.metadata import TABLES
from ldm.data.picture import READABLE, UNREADABLE


class Place:
    """What is at a path, looked at no further than is asked.

    Args:
        path: a file, a folder, or a pattern of files.
        folder: it, if it is one; None of all else.
        below: lists all files below a folder, hidden ones aside, ``/`` between the parts.
    """

    def __init__(self, path: str, folder: Path | None, below: Callable[[Path], list[str]]) -> None:
        self.path, self.folder, self._below = path, folder, below

    @cached_property
    def names(self) -> list[str]:
        """The files below the folder."""
        return [] if self.folder is None else self._below(self.folder)

    def ending(self, *endings: str) -> list[str]:
        """Those of ``names`` that end in one of these, in small letters or capitals."""
        return [name for name in self.names if name.lower().endswith(endings)]

    @cached_property
    def pictures(self) -> list[str]:
        """Files that are pictures by their names."""
        return self.ending(*READABLE, *UNREADABLE)

    @cached_property
    def tables(self) -> list[str]:
        """Tables of captions for pictures."""
        return [name for name in self.names if Path(name).name in TABLES]


class AtPath:
    """What sources have in common that lie at a path; a base of their configs."""

    endings: ClassVar[tuple[str, ...]] = ()
    """Of the names of files that are one."""
    contents: ClassVar[str] = ""
    """What is in a folder that is one: files with these endings, in a reader's words."""
    precedence: ClassVar[int] = 0
    """Of several that recognise a folder the greatest is meant; equal ones are ambiguous."""

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """What speaks for ``place`` being one, None if nothing does: a file or a pattern by how it
        ends, a folder by files that end so.
        """
        if place.folder is not None:
            return counted(cls.contents, place.ending(*cls.endings)) if cls.contents else None
        ends = (ending for ending in cls.endings if place.path.lower().endswith(ending))
        return next((f"the name ends in {ending}" for ending in ends), None)


def counted(what: str, names: list[str]) -> str | None:
    """How many files speak for something, and the first of them."""
    return f"{len(names)} {what}, the first is {min(names)}" if names else None
