"""Folders that are the old one or the new one, whenever a process is killed.

A folder is made beside the one that it replaces, flushed to disk, and takes its name in one step.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ldm.storage.disk import let_read

STAGING = ".staging-"
"""What the names of unfinished folders begin with."""
_CURRENT, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def flush(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Brings all that is in ``folder``, which is new, to the disk, the folder last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            if path.is_file():
                let_read(path)
            flush(path)
    flush(folder)


def take_place(staging: Path, folder: Path) -> None:
    """Gives ``staging`` the name of ``folder``; what had it before is removed.

    Where the system can exchange two names that is one step; elsewhere the old folder is moved
    aside first, so that a kill between the two renames loses nothing.
    """
    replaced = folder.parent / f"{STAGING}replaced-{folder.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if not folder.exists():
        staging.rename(folder)
    elif _exchange(staging, folder):
        replaced = staging
    else:
        folder.rename(replaced)
        try:
            staging.rename(folder)
        except OSError:
            replaced.rename(folder)
            raise
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change names; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # of an old C library
        return False
    if rename(_CURRENT, os.fsencode(one), _CURRENT, os.fsencode(other), _EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def replace(
    folder: Path,
    write: Callable[[Path], None],
    mine: Callable[[Path], Iterable[str]],
    *,
    last: str,
) -> None:
    """Makes ``folder`` what ``write(staging)`` puts into an empty folder; what else is there stays.

    A folder that cannot change its name (a mounted one, or where this process works) is staged
    within itself: a kill while its entries are replaced leaves it without ``last``.

    Args:
        folder: made if it is not there; of a link, what it points to.
        write: fills the folder that it is given; if it fails, ``folder`` is what it was.
        mine: of ``folder`` as it is, the names that go if they are not written again.
        last: the file without which the folder is none.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.is_dir() and not _movable(folder)
    staging = (folder if inside else folder.parent) / f"{STAGING}{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        write(staging)
        flush_all(staging)
        new, old = _names(staging), _names(folder) if folder.is_dir() else set()
        gone = old & (set(mine(folder)) | new) if old else set()
        if inside:
            _move_in(staging, folder, gone, last)
            return
        for name in sorted(old - gone):
            _link(folder / name, staging / name)
        if folder.is_dir():
            shutil.copymode(folder, staging)
        take_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def _movable(folder: Path) -> bool:
    at_work = folder == Path.cwd() or folder in Path.cwd().parents
    return not (at_work or os.path.ismount(folder)) and os.access(folder.parent, os.W_OK)


def _move_in(staging: Path, folder: Path, gone: Iterable[str], last: str) -> None:
    (folder / last).unlink(missing_ok=True)
    for name in gone:
        _remove(folder / name)
    for name in sorted(_names(staging), key=lambda name: (name == last, name)):
        (staging / name).rename(folder / name)
    flush(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """The same entry a second time, without its bytes where the file system can."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)
