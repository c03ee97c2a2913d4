"""How a run ends early: all of its processes at the same step, one of them telling why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from ldm.engine.asked import Asked
from ldm.engine.hold import hold
from ldm.engine.signals import REQUESTS, Interrupted
from ldm.engine.watch import WATCH
from ldm.errors import DiskError, RunError, ToldElsewhere
from ldm.storage.disk import writing

WAIT = timedelta(hours=24)
"""How long processes wait for one that fills a cache, draws or saves."""


def at_once() -> None:
    """Waits for nothing."""


class Coordinator:
    """What has come up on this process, and what all of them make of it.

    Args:
        accelerator: the processes.
        run: the folder that this run alone writes into.

    Raises:
        RunError: another run does.
        ConfigError: there can be no such folder.
    """

    def __init__(self, accelerator: Accelerator, run: Path) -> None:
        self.accelerator, self.run = accelerator, run
        self.place = hold(run, "run", accelerator)
        self.failure: RunError | None = None
        # Of the hosts: what they agree on is known there, and no queue of a GPU has to be emptied.
        several = accelerator.num_processes > 1
        self.group = distributed.new_group(backend="gloo", timeout=WAIT) if several else None
        self.saved: Path | None = None  # the newest checkpoint, from which the run can go on
        self.settled = at_once  # waits for one that is being written
        self._asked = Asked(run) if accelerator.is_main_process else None
        self._wanted = False

    def sync(self, *, wrong: bool = False) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any finds something ``wrong``. With
        more than one process a collective that waits for the others, but for no device.

        Raises:
            RunError: the main process could not write.
            ToldElsewhere: the same, on the other processes.
        """
        asked = self._asked is not None and self._asked.look()
        told = [REQUESTS.by is not None, wrong, self.failure is not None, asked]
        here = torch.tensor(told).byte()
        WATCH.mark()
        if self.group is not None:
            distributed.all_reduce(here, distributed.ReduceOp.MAX, group=self.group)
        WATCH.rest()
        stopping, wrong, failed, asked = here.bool().tolist()
        self._wanted |= asked
        if failed:
            raise self.failure or ToldElsewhere()
        return stopping, wrong

    def due(self, usual: bool) -> bool:
        """Whether samples are due: as ``usual``, or since somebody has asked for them."""
        wanted, self._wanted = self._wanted, False
        return usual or wanted

    def stop(self, what_is_kept: str) -> None:
        """Raises ``Interrupted``."""
        by = REQUESTS.by or "a signal to another process"
        line = f"{by} came; {what_is_kept}: run the same command again to go on"
        raise Interrupted(line if self.accelerator.is_main_process else "")

    def on_main(self, what: str, where: Path, write: Callable[[], None]) -> None:
        """Lets the main process write, unless it already failed to."""
        self.failure = self.failure or self._moved()
        if self.accelerator.is_main_process and self.failure is None:
            with self.kept(what, where):
                write()

    @contextmanager
    def kept(self, what: str, where: Path) -> Iterator[None]:
        """Keeps the error of a full disk, or of a run folder that is gone, for ``agree``: raised
        here and now, it would leave the other processes waiting for this one.
        """
        try:
            with writing(what, where, self.then):
                yield
        except Exception as error:
            disk = error if isinstance(error, DiskError) else None
            self.failure = self.failure or self._moved() or disk
            if self.failure is None:
                raise

    def _moved(self) -> RunError | None:
        """The error of a run folder that is not where it was."""
        if self.place is None or not self.place.gone():
            return None
        return RunError(
            f"run: {self.run} was removed, renamed or replaced while the run went on, and nothing"
            f" is written elsewhere: put it back, and {self.then()}"
        )

    def then(self) -> str:
        """What becomes of the run after a fault that is no fault of its own."""
        self.settled()
        at = f"from {self.saved}" if self.saved else "from its start, as it has no checkpoint yet"
        return f"the same command goes on {at}"
