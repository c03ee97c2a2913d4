"""How a run ends early: all of its processes at the same step, one of them telling why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from ldm.engine.disk import DiskError, writing
from ldm.engine.fault import ToldElsewhere
from ldm.engine.interrupt import REQUESTS, Interrupted


class Ending:
    """What has come up on this process, and what all of them make of it.

    Args:
        accelerator: the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.failure: DiskError | None = None
        self.saved: Path | None = None  # the newest checkpoint, from which the run can go on

    def agree(self, *, wrong: bool = False) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any finds something ``wrong``. With
        more than one process a collective that waits for its result.

        Raises:
            DiskError: the main process could not write.
            ToldElsewhere: the same, on the other processes.
        """
        here = [REQUESTS.by is not None, wrong, self.failure is not None]
        if self.accelerator.num_processes > 1:
            flags = torch.tensor(here, dtype=torch.float32, device=self.accelerator.device)
            here = [count > 0 for count in self.accelerator.reduce(flags, "sum").tolist()]
        stopping, wrong, failed = here
        if failed:
            raise self.failure or ToldElsewhere()
        return stopping, wrong

    def leave(self, what_is_kept: str) -> None:
        """Raises ``Interrupted``."""
        by = REQUESTS.by or "a signal to another process"
        line = f"{by} came; {what_is_kept}: run the same command again to go on"
        raise Interrupted(line if self.accelerator.is_main_process else "")

    def written(self, what: str, where: Path, write: Callable[[], None]) -> None:
        """Lets the main process write, unless it already failed to."""
        if self.accelerator.is_main_process and self.failure is None:
            with self.kept(what, where):
                write()

    @contextmanager
    def kept(self, what: str, where: Path) -> Iterator[None]:
        """Keeps the error of a full disk for ``agree``: raised here and now, it would leave the
        other processes waiting for this one.
        """
        try:
            with writing(what, where, self.then()):
                yield
        except DiskError as error:
            self.failure = self.failure or error

    def then(self) -> str:
        """What becomes of the run after a fault that is no fault of its own."""
        at = f"from {self.saved}" if self.saved else "from its start, as it has no checkpoint yet"
        return f"the same command goes on {at}"
