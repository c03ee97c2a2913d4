"""Processes that read pictures, and their end.

They ignore the signals that ask a run to stop: the step that needs their pictures is finished
first. So they must be ended by the training process, in whatever way it leaves its loop; what
multiprocessing does at exit, SIGTERM and waiting, would wait forever.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any

from torch.utils.data import DataLoader

from ldm.engine.interrupt import SIGNALS


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The batches of ``loader``; its processes have ended when this is left."""
    before = {child.pid for child in active_children()}
    batches = iter(loader)
    mine = [child for child in active_children() if child.pid not in before]
    try:
        yield batches
    finally:
        if mine:
            # Not by the last reference: the frames of an error hold more of them.
            batches._shutdown_workers()  # type: ignore[attr-defined]
        for child in mine:  # one that still reads a picture
            child.kill()
            child.join()


def ignore_signals(_: int) -> None:
    """For ``worker_init_fn``."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
