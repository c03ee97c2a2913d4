"""A folder that one program at a time writes into: a lock that dies with its process.

The lock is a record lock of POSIX (``fcntl.lockf``) and not ``flock``: what a process forks does
not inherit it, so that a data worker which outlives a killed run keeps nothing locked; and NFS
carries it from machine to machine. It goes with the first descriptor of the file that the process
closes, which is why each file is opened once in a process, and here alone.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"
"""The file in the folder; it stays there, and says which process was the last."""

_TAKEN = {errno.EAGAIN, errno.EACCES}
_held: WeakValueDictionary[tuple[int, int], Lock] = WeakValueDictionary()


class InUseError(RuntimeError):
    """Another process has the lock; the message says which one."""


class Lock:
    """The lock of ``folder``, held as long as this object lives; ``lock`` makes it.

    Args:
        folder: of the file.
        descriptor: of the file, locked.
        sure: whether its file system has locks at all.
    """

    def __init__(self, folder: Path, descriptor: int, *, sure: bool) -> None:
        self.folder, self.sure, self._file = folder, sure, descriptor
        # An open folder keeps its number: one that is made in its place has another.
        self._place = os.open(folder, os.O_RDONLY) if fcntl else None

    def gone(self) -> bool:
        """Whether the folder is not where it was: removed, renamed, or another in its place."""
        try:
            there = os.stat(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return self._place is not None and not os.path.samestat(there, os.fstat(self._place))

    def __del__(self) -> None:
        os.close(self._file)
        if self._place is not None:
            os.close(self._place)


def lock(folder: Path) -> Lock:
    """Locks ``folder``. Within one process all share one lock.

    Raises:
        InUseError: another process holds it.
        OSError: the file cannot be written.
    """
    file = folder / NAME
    if file.exists() and (mine := _held.get(_number(os.stat(file)))):
        return mine
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        sure = _locked(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode())
        made = Lock(folder, descriptor, sure=sure)
    except BaseException:
        os.close(descriptor)
        raise
    _held[_number(os.fstat(descriptor))] = made
    return made


def _locked(descriptor: int, folder: Path) -> bool:
    """Whether it is locked now; not where there are no locks. Raises ``InUseError``."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            return False
        words = os.read(descriptor, 300).decode(errors="replace").split()
        by = "another process"
        if len(words) == 2:
            by = f"process {words[1]} on {words[0]}"
        raise InUseError(f"{folder} is in use by {by}") from None
    return True


def _number(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino
