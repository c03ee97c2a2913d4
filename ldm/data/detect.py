"""Which layout a path is, for a data config without ``kind``."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from ldm.data.cached import MADE_WITH
from ldm.data.files import WILD, below
from ldm.data.folder import natural
from ldm.data.hub import SAVED, SAVED_SPLITS
from ldm.data.metadata import TABLES
from ldm.data.picture import READABLE, UNREADABLE
from ldm.errors import DataError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_REPEATS = re.compile(r"([1-9][0-9]{0,2}_[^/]+)/[^/]+")
_KINDS = {".parquet": "parquet", ".toml": "sd_scripts"} | dict.fromkeys(_TARS, "webdataset")


class AmbiguousError(DataError):
    """A path holds data in several layouts."""


class Detected(NamedTuple):
    """``kind`` of the data config, and what speaks for it."""

    kind: str
    reason: str


def detect(path: str) -> Detected:
    """The layout of ``path``: a file, a folder or a pattern of files.

    Raises:
        AmbiguousError: there are several layouts in it.
        DataError: there is no such path, or nothing in it is known.
    """
    here = Path(path).expanduser()
    if not os.path.isdir(here):  # Path's own raises for a pattern longer than a name may be
        return _file(path, here)
    if (here / MADE_WITH).is_file():
        return Detected("cached", f"there is {MADE_WITH}")
    if all((here / name).is_file() for name in SAVED):
        return Detected("datasets", f"there is {' and '.join(SAVED)}")
    if (here / SAVED_SPLITS).is_file():
        return Detected("datasets", f"there is {SAVED_SPLITS}")
    names = below(here)
    found = _layouts(names)
    if not found:
        raise DataError(f"{here}: no pictures, tars or parquet files in this folder or below it")
    if list(found) == ["folder"] and (named := _repeated(names)):
        told = f"all pictures are in folders named by repeats: {', '.join(named)}"
        return Detected("sd_scripts", told)
    if len(found) > 1:
        both = " and ".join(f"{kind} ({reason})" for kind, reason in found.items())
        raise AmbiguousError(f"{here}: several layouts, set data.kind to one: {both}")
    return Detected(*found.popitem())


def layout(path: str) -> Detected:
    """The same for what need not be there yet: a folder where nothing else is known, whose own
    errors say what is wrong with it.

    Raises:
        AmbiguousError: there are several layouts in it.
        DataError: no file system can have such a path.
    """
    check_path(path)
    try:
        return detect(path)
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


def _file(path: str, here: Path) -> Detected:
    for suffix, kind in _KINDS.items():
        if path.lower().endswith(suffix):
            return Detected(kind, f"the name ends in {suffix}")
    if os.path.exists(here):
        raise DataError(
            f"{here}: this file is no .tar, .parquet or .toml; data.path may be a folder as well"
        )
    raise DataError(
        f"{here}: this file or folder does not exist, check data.path"
        " (for a data set of the Hub set data.kind to datasets)"
    )


def _layouts(names: list[str]) -> dict[str, str]:
    """What speaks for each layout that ``names`` of files fit."""
    lower = [(name, name.lower()) for name in names]
    tars = [name for name, low in lower if low.endswith(_TARS)]
    tables = [name for name in names if Path(name).name in TABLES]
    pictures = [name for name, low in lower if low.endswith((*READABLE, *UNREADABLE))]
    # img2dataset writes a table of addresses beside each tar.
    beside = {name.split(".tar")[0] for name in tars}
    parquet = [
        name
        for name, low in lower
        if low.endswith(".parquet")
        and name not in tables
        and name[: -len(".parquet")] not in beside
    ]
    told = {
        "folder": _told("pictures", pictures) or _told("tables of captions", tables),
        "webdataset": _told("tars", tars),
        "parquet": _told("parquet files", parquet),
    }
    return {kind: reason for kind, reason in told.items() if reason}


def _repeated(names: list[str]) -> list[str]:
    """The first of the folders that are named like ``10_sks dog`` (no year, no ``01_``), if every
    picture lies in one and there is no table of captions.
    """
    pictures = [name for name in names if name.lower().endswith((*READABLE, *UNREADABLE))]
    if any(Path(name).name in TABLES for name in names):
        return []
    fits = [_REPEATS.fullmatch(name) for name in pictures]
    found = sorted({fit[1] for fit in fits if fit}, key=natural)
    return found[:3] if all(fits) else []


def _told(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}, the first is {min(names)}" if names else ""
