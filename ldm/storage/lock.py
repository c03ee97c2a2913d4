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
import struct
import sys
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"
"""The file in the folder; it stays there, and says which process was the last."""

# struct flock: type, from where, start, length, process; the BSDs have the type last.
_FLOCK, _TYPE, _PROCESS = ("hhqqi0q", 0, 4) if sys.platform == "linux" else ("qqihh0q", 3, 2)
_TAKEN = {errno.EAGAIN, errno.EACCES}
_held: WeakValueDictionary[tuple[int, int], Lock] = WeakValueDictionary()


class InUseError(RuntimeError):
    """Another process has the lock; the message says which one."""


class Holder(NamedTuple):
    """Who has a lock.

    Args:
        host: name of its machine, as it says itself; "" if it does not.
        process: its id there.
        here: whether it is a process of this machine, of which that id is the kernel's own word.
    """

    host: str
    process: int
    here: bool


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


def holder(folder: Path) -> Holder | None:
    """Who has the lock of ``folder``; None: nobody, or the file system has no locks. It asks and
    takes nothing, so that who only looks is never in the way of a program that begins. Not to be
    called while another thread of this process locks the same folder.
    """
    file = folder / NAME
    try:
        state = os.stat(file)
        if _number(state) in _held:  # the file must not be opened a second time
            return Holder(socket.gethostname(), os.getpid(), True)
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _asked(descriptor)
    finally:
        os.close(descriptor)


def _asked(descriptor: int) -> Holder | None:
    if fcntl is None:
        return None
    values = [0, 0, 0, 0, 0]
    values[_TYPE] = fcntl.F_WRLCK
    try:
        told = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, *values))
    except OSError:
        return None
    found = struct.unpack(_FLOCK, told)
    if found[_TYPE] == fcntl.F_UNLCK:
        return None
    host, process = _words(descriptor) or ("", 0)
    return Holder(host, process, found[_PROCESS] == process and host == socket.gethostname())


def _words(descriptor: int) -> tuple[str, int] | None:
    """Host and process that the file says; None if it says none."""
    words = os.read(descriptor, 300).decode(errors="replace").split()
    return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else None


def _locked(descriptor: int, folder: Path) -> bool:
    """Whether it is locked now; not where there are no locks. Raises ``InUseError``."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            return False
        words = _words(descriptor)
        by = f"process {words[1]} on {words[0]}" if words else "another process"
        raise InUseError(f"{folder} is in use by {by}") from None
    return True


def _number(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino
