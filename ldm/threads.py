"""Threads that share a machine's cores with other programs, and its memory with each other."""

from __future__ import annotations

import os

_M_ARENA_MAX = -8
"""Of ``malloc.h``."""


def wait_asleep() -> None:
    """Lets threads of PyTorch that wait for each other on a CPU sleep soon, and not spin.

    Of two threads on two cores, of which another program held one, a network of 20 convolutions
    took 31 s where threads spin as long as GNU OpenMP lets them, 1.8 s here, 1.3 s with one thread;
    on two idle cores 0.54, 0.55 and 0.81 s. What the environment says stays.

    It is read when torch is imported, so this comes before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def share_memory() -> None:
    """Lets the many threads of a server take memory from two arenas of the GNU C library.

    Each of them otherwise has its own, with blocks that it alone takes again: a server of 16
    threads held 1,179 MB after 1,000 pictures, and 1,115 MB with two arenas, in the same time. What
    the environment says stays, and other C libraries have no such arenas.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    import ctypes  # which no other command needs

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
