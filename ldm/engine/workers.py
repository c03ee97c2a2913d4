"""Processes that read pictures, and their end.

They ignore the signals that ask a run to stop: the step that needs their pictures is finished
first. So they must be ended by the training process, in whatever way it leaves its loop; what
multiprocessing does at exit, SIGTERM and waiting, would wait forever.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, default_collate

from ldm.engine.signals import SIGNALS
from ldm.engine.task import Draws
from ldm.engine.watch import WATCH, patience
from ldm.errors import RunError

_MOST = 8  # beyond, a disk is no faster
_TIMED_OUT, _KILLED = "DataLoader timed out", re.compile(r"DataLoader worker \(pid.*")


def readers(asked: int | Literal["auto"], draws: Draws, device: torch.device) -> int:
    """How many processes read for one of the run, where ``auto`` may be asked for: none on a CPU,
    whose cores compute.
    """
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return 0
    if draws.one_reader:
        return 1
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max((os.cpu_count() or 1) // beside - 1, 1), _MOST)


def loader(
    draws: Draws,
    sampler: Any,
    workers: int | Literal["auto"],
    device: torch.device | None = None,
) -> DataLoader[Any]:
    """The batches of ``sampler``, read by ``workers`` processes, or by this one if that is 0.

    Args:
        draws: map-style; those that know ``__getitems__`` give finished batches.
        sampler: lists of numbers of ``draws``.
        workers: one that hangs ends the run after ``ldm.engine.watch.patience``.
        device: that computes, by which ``auto`` is a number; None: the CPU.
    """
    workers = readers(workers, draws, device or torch.device("cpu"))
    return DataLoader(
        draws,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=_collated,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        timeout=patience() if workers else 0,
    )


def _collated(drawn: Any) -> Any:
    """A batch: what ``__getitems__`` gave, or rows side by side."""
    return drawn if isinstance(drawn, dict) else default_collate(drawn)


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The batches of ``loader``; its processes have ended when this is left.

    Raises:
        RunError: one of them hangs, or was killed.
    """
    before = {child.pid for child in active_children()}
    batches = iter(loader)
    mine = [child for child in active_children() if child.pid not in before]
    try:
        yield _marked(batches)
    except RuntimeError as error:  # torch raises it wherever the loop is when one is killed
        pids = ", ".join(str(child.pid) for child in mine)
        if (told := _told(str(error), pids)) is None:
            raise
        raise RunError(told) from None
    finally:
        WATCH.rest()
        if mine:
            # Not by the last reference: the frames of an error hold more of them.
            batches._shutdown_workers()  # type: ignore[attr-defined]
        for child in mine:  # one that still reads a picture
            child.kill()
            child.join(10)  # a disk that does not answer may keep it


def _marked(batches: Iterator[Any]) -> Iterator[Any]:
    WATCH.mark()
    for batch in batches:
        WATCH.mark()
        yield batch
        WATCH.mark()


def _told(error: str, pids: str) -> str | None:
    """What an error of the loader means; None: something else."""
    who, again = f"rank {WATCH.rank}", "the same command goes on from the newest checkpoint"
    if error.startswith(_TIMED_OUT):
        return (
            f"{who}: no batch came from the processes that read pictures ({pids}) for"
            f" {patience():.0f} seconds: one of them hangs, or the disk or network that it reads;"
            f" {again} (LDM_TIMEOUT sets the seconds)"
        )
    if found := _KILLED.search(error):
        what = found[0].removeprefix("DataLoader worker ").splitlines()[0]
        return f"{who}: a process that reads pictures is gone, {what}; {again}"
    return None


def ignore_signals(_: int) -> None:
    """For ``worker_init_fn``."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
