"""Which file a name means that somebody wrote down elsewhere.

A Mac keeps ``é`` as two characters (Unicode normal form D) where a table has one (form C); a script
writes whole paths where a table counts from its own folder. What is found is always one of the
files that a walk through the folder has met: a name leads nowhere else.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Set
from functools import lru_cache
from pathlib import Path

from ldm.data.rows import Row

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[^\\]*\\")


def composed(name: str) -> str:
    """``name`` in Unicode normal form C: equal for names that look equal."""
    return unicodedata.normalize("NFC", name)


def of_windows(name: str) -> bool:
    """Whether ``name`` has a drive letter or backslashes between its folders."""
    return _WINDOWS.match(name) is not None


def as_stored(path: Path, folder: Path) -> Path:
    """``path``, which counts from ``folder``, with the names that the disk has: where there are
    others in another normal form only, those.
    """
    if str(path).isascii() or os.path.lexists(folder / path):
        return path
    parent = as_stored(path.parent, folder)
    try:
        found = _listed(folder / parent, os.stat(folder / parent).st_mtime_ns).find(path.name)
    except (OSError, ValueError):  # whoever opens it is told
        return path
    return parent / found[0] if len(found) == 1 else path


# Not for every row of a table anew.
@lru_cache(maxsize=16)
def _listed(folder: Path, _changed: int) -> Names:
    return Names(frozenset(os.listdir(folder)))


class Names:
    """Names of files, found in whatever normal form they are asked for.

    Args:
        names: as the disk has them; is not copied.
    """

    def __init__(self, names: Set[str]) -> None:
        self._names = names
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if not name.isascii():
                self._alike[composed(name)].append(name)

    def find(self, name: str) -> list[str]:
        """Those that ``name`` means: one, or none, or several that differ in normal form only."""
        if name.isascii():
            return [name] if name in self._names else []
        return sorted(self._alike.get(composed(name), ()))

    def doubles(self) -> list[Row]:
        """Those that differ in normal form only, as problems."""
        wrong = (
            "files whose names differ only in how accents are stored (Unicode normal form);"
            " rename or remove one"
        )
        alike = sorted(name for found in self._alike.values() if len(found) > 1 for name in found)
        return [Row(name, (), problem=wrong) for name in alike]


class Root:
    """A folder that names are looked up in.

    Args:
        path: of the folder.
        names: of the files below it.
    """

    def __init__(self, path: str | os.PathLike[str], names: Names) -> None:
        self.names = names
        self._paths = [
            os.path.join(root, "") for root in (os.path.abspath(path), os.path.realpath(path))
        ]

    def find(self, folder: str, name: str) -> tuple[str, str]:
        """The file that ``name`` means, or "", and what is wrong then: a phrase for a problem.

        Args:
            folder: that a relative name counts from, below the root.
            name: relative, or a whole path that leads into the root.
        """
        inside = False
        for key in self._keys(folder, name):  # one after the other: to follow links is slow
            if found := self.names.find(key):
                return found[0], ""
            inside = True
        if of_windows(name):
            return "", "with a path of Windows; write the path from the table's folder, with /"
        if not inside:
            return "", "that point out of the folder; move the pictures into it"
        return "", "without a picture; add it or remove the row"

    def _keys(self, folder: str, name: str) -> Iterator[str]:
        """What the name can mean below the root: as it is written, then links followed."""
        if "\0" in name:  # no path at all
            return
        whole = os.path.join(self._paths[0], folder, name)
        yield from self._below(os.path.normpath(whole))
        parent, last = os.path.split(whole)
        if last not in ("", ".", ".."):
            yield from self._below(os.path.join(os.path.realpath(parent), last))

    def _below(self, path: str) -> Iterator[str]:
        for root in self._paths:
            if path.startswith(root):
                yield path.removeprefix(root).replace(os.sep, "/")
