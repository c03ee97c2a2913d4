"""Files that are whole or are not there, and what is told when the disk takes no more."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import DiskError

# What the disk can say; any other error while something is written is a bug, with its traceback.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip
# safetensors and tokenizers are written in Rust, and raise errors of their own with this in them.
_RUST = re.compile(r"\(os error (\d+)\)")


_UMASK = os.umask(0o077)  # which is told by setting another
os.umask(_UMASK)


def let_read(file: Path) -> None:
    """Gives a new ``file`` the mode of new files: safetensors makes those that it writes readable
    to their owner alone. One that is linked elsewhere stays as it is.
    """
    status = file.stat()
    if status.st_nlink == 1 and status.st_mode & 0o777 == 0o600:
        file.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the name of ``file`` at the end; on an error it is removed
    and ``file`` is what it was. The folder is made. Several processes may write the same file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}-{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """``file`` with ``text`` (UTF-8), or as it was."""
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def writing(what: str, where: Path, then: str | Callable[[], str]) -> Iterator[None]:
    """Makes one line of a full disk.

    Args:
        what: is written.
        where: the folder.
        then: what becomes of the run when there is room again, or what says it once it is asked.

    Raises:
        DiskError: instead of the error that said so, whoever raised it.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, where)
        if reason is None:
            raise
        then = then if isinstance(then, str) else then()
        raise DiskError(
            f"{what} cannot be written in {where}: {reason} ({_free(where)} free there);"
            f" the run ends, and what was there before is whole: make room, and {then}"
        ) from None


def _reason(error: BaseException, where: Path) -> str | None:
    """What the disk said, or None if it was not the disk."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST.search(str(error))):
        number = int(found[1])
    removed = number in (errno.ENOENT, errno.ENOTDIR) and not where.exists()
    return os.strerror(number) if number and (number in _DISK or removed) else None


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    size = float(shutil.disk_usage(folder).free)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
