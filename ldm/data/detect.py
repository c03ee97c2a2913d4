"""Which layout a path is, for a data config without ``kind``."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ldm.data.files import WILD, below
from ldm.data.place import AtPath, Place
from ldm.errors import DataError

Layouts = Mapping[str, type[AtPath]]
"""Sources by kind."""


class AmbiguousError(DataError):
    """A path holds data in several layouts."""


class Detected(NamedTuple):
    """``kind`` of the data config, and what speaks for it."""

    kind: str
    reason: str


def detect(path: str, layouts: Layouts) -> Detected:
    """The one of ``layouts`` that ``path`` is: a file, a folder or a pattern of files.

    Raises:
        AmbiguousError: there are several in it.
        DataError: there is no such path, or nothing in it is known.
    """
    here = Path(path).expanduser()
    folder = here if os.path.isdir(here) else None  # Path's own raises for an endless pattern
    place = Place(path, folder, below)
    for precedence in sorted({layout.precedence for layout in layouts.values()}, reverse=True):
        asked = {k: layout for k, layout in layouts.items() if layout.precedence == precedence}
        told = {kind: layout.recognises(place) for kind, layout in asked.items()}
        found = {kind: reason for kind, reason in told.items() if reason}
        if len(found) > 1:
            both = " and ".join(f"{kind} ({reason})" for kind, reason in found.items())
            raise AmbiguousError(f"{here}: several layouts, set data.kind to one: {both}")
        if found:
            return Detected(*found.popitem())
    if folder:
        what = _listed([layout.contents for layout in layouts.values() if layout.contents])
        raise DataError(f"{here}: no {what} in this folder or below it")
    if os.path.exists(here):
        ends = _listed([layout.endings[0] for layout in layouts.values() if layout.endings])
        raise DataError(f"{here}: this file is no {ends}; data.path may be a folder as well")
    raise DataError(
        f"{here}: this file or folder does not exist, check data.path"
        " (for a data set of the Hub set data.kind to datasets)"
    )


def layout(path: str, layouts: Layouts) -> Detected:
    """The same for what need not be there yet: a folder where nothing else is known, whose own
    errors say what is wrong with it.

    Raises:
        AmbiguousError: there are several layouts in it.
        DataError: no file system can have such a path.
    """
    check_path(path)
    try:
        return detect(path, layouts)
    except AmbiguousError:
        raise
    except DataError as error:
        return Detected("folder", str(error))


def check_path(path: str) -> None:
    """``DataError`` for a path that no file system can have."""
    try:
        os.stat(Path(path).expanduser())
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or WILD.search(path):
            return  # who opens it tells
        raise DataError(f"{path[:80]!r} ... is no path: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # a zero in it; nobody's home
        raise DataError(f"{path[:80]!r} is no path: {error}") from None


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
