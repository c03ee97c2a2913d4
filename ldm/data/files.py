"""Which files a path means: one, all below a folder, or a pattern with braces and wildcards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from ldm.data.folder import natural
from ldm.data.index import Indexed, Part
from ldm.data.rows import Row
from ldm.errors import DataError

WILD = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
MOST = 1_000_000
"""Files that one pattern may spell out."""


class Files(Indexed):
    """What sources have in common that are files of many pictures each; a base of their configs.

    A config gives ``path``, the ``suffix`` of its files, and the part of one.
    """

    path: str
    suffix: ClassVar[str]

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return str(Path(self.path).expanduser())

    def where(self, key: str) -> str:
        """The path of the file, and the picture in it."""
        return str(self._found[0] / key)

    @cached_property
    def parts(self) -> Sequence[Part]:
        """One per file, so that a new one leaves the index of the others alone."""
        root, files = self._found
        parts = [self._part(file, file.relative_to(root).as_posix()) for file in files]
        here = Path(self.path).expanduser()
        strays = unfollowed(here, self.suffix) if here.is_dir() else []
        if strays:
            parts.append(
                Part(
                    path=str(here.resolve()),
                    settings=f"links {self.suffix}",
                    files=[(row.key, 0, 0) for row in strays],
                    rows=lambda: strays,
                    read=_nothing,
                )
            )
        return parts

    @cached_property
    def _found(self) -> tuple[Path, list[Path]]:
        return find(self.path, self.suffix)

    @cached_property
    def shards(self) -> np.ndarray:
        """Number of the file that each picture is in, int32 ``n``."""
        return self.examples.parts()

    def _part(self, file: Path, name: str) -> Part:
        """The part that is ``file``, whose path below the root of all is ``name``."""
        raise NotImplementedError


def find(path: str, suffix: str) -> tuple[Path, list[Path]]:
    """The files that ``path`` means, in natural order, and the folder that their names count from.

    Args:
        path: a file; a folder, of which every file below it that ends in ``suffix`` is meant; or a
            pattern: ``train-{000..099}.tar``, ``{a,b}/*.tar``. Every name that braces alone spell
            out must be there.
        suffix: ``".tar"``.

    Raises:
        DataError: there is no such file, or it is not on this machine.
    """
    if "://" in path or path.startswith("pipe:"):
        raise DataError(f"{path}: only files of this machine are read, download them first")
    here = Path(path).expanduser()
    if os.path.isdir(here):  # Path's own raises for a pattern that is longer than a name may be
        names = [name for name in below(here) if name.lower().endswith(suffix)]
        names = [name for name in names if (here / name).exists()]  # no link to nothing
        files = [here / name for name in sorted(names, key=natural)]
        if not files:
            raise DataError(f"{here}: no {suffix} file in this folder or below it")
        return here, files
    if os.path.exists(here):
        return here.parent, [here]
    if not WILD.search(path):
        raise DataError(f"{here}: this file or folder does not exist, check data.path")
    found = dict.fromkeys(name for text in braces(str(here)) for name in _spelled(text))
    names = sorted(found, key=natural)
    if not names:
        raise DataError(f"{here}: no file matches this pattern, check data.path")
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise DataError(
            f"{here}: {len(missing)} of {len(names)} files do not exist, the first is {missing[0]}"
        )
    # Names count from the folder in front of the first wildcard, whatever matches today.
    wild = next(n for n, part in enumerate(here.parts) if WILD.search(part))
    return Path(*here.parts[:wild]), [Path(name) for name in names]


def below(folder: Path) -> list[str]:
    """Paths of all files below ``folder`` that are not hidden, ``/`` between the parts, unsorted.
    Links to files are followed, for the files of a download may be links into its cache.

    Raises:
        DataError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    found = []
    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        place = Path(here).relative_to(folder)
        found += [(place / name).as_posix() for name in names if not name.startswith(".")]
    return found


def unfollowed(folder: Path, suffix: str) -> list[Row]:
    """The links in ``folder`` or below it which lead to files that end in ``suffix`` and are left
    out, as problems: those to folders outside, and to nothing.
    """
    real, found = folder.resolve(), []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in folders:
            link = Path(here, name)
            target = link.resolve()
            if not link.is_symlink() or target.is_relative_to(real):
                continue
            if any(file.lower().endswith(suffix) for file in below(target)):
                wrong = f"links to folders with {suffix} files, which are not followed; copy them"
                found.append(Row(f"{link.relative_to(folder).as_posix()}/", (), problem=wrong))
        for name in names:
            link = Path(here, name)
            if name.lower().endswith(suffix) and link.is_symlink() and not link.exists():
                wrong = "links to nothing; remove them"
                found.append(Row(link.relative_to(folder).as_posix(), (), problem=wrong))
    return found


def _nothing(row: Row) -> bytes:
    raise DataError("there is no picture behind a link that is not followed")


def braces(text: str) -> list[str]:
    """``a-{08..10}.tar`` -> ``a-08.tar``, ``a-09.tar``, ``a-10.tar``; ``{x,y}`` -> ``x``, ``y``.

    Raises:
        DataError: a range ends before it begins, or there are more than ``MOST`` names.
    """
    found, rest = list[str](), [text]
    while rest:
        name = rest.pop()
        match = re.search(r"\{([^{}]*)\}", name)
        if not match:
            found.append(name)
            continue
        words: Sequence[object] = match[1].split(",")
        digits = 0
        if span := _RANGE.fullmatch(match[1]):
            digits, first, last = len(span[1]), int(span[1]), int(span[2])
            if last < first:
                raise DataError(f"{text}: the range {match[0]} ends before it begins")
            words = range(first, last + 1)
        if len(found) + len(rest) + len(words) > MOST:
            raise DataError(
                f"{text[:80]}: its braces spell out more than {MOST:,} files: name their folder"
            )
        before, after = name[: match.start()], name[match.end() :]
        rest += [f"{before}{word:0{digits}d}{after}" if digits else f"{before}{word}{after}"
                 for word in reversed(words)]  # fmt: skip
    return found


def _spelled(text: str) -> list[str]:
    return glob.glob(text, recursive=True) if glob.has_magic(text) else [text]
