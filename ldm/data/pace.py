"""How far a long piece of work is: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_EVERY = 30.0  # seconds between two lines


class Pace:
    """Tells how much of ``total`` is done, how fast, and when the rest will be.

    Args:
        what: is made.
        unit: of what is counted, in the plural.
        total: how many there will be.
        quiet: tells nothing.
    """

    def __init__(self, what: str, unit: str, total: int, *, quiet: bool = False) -> None:
        self.what, self.unit, self.total, self.quiet = what, unit, total, quiet
        self.done = 0.0
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Pace:
        self._progress.start()
        self._bar = self._progress.add_task(f"caching {self.what}", total=self.total, speed="")
        self._start = self._told = time.monotonic()
        return self

    def advance(self, count: float) -> None:
        """``count`` more are done."""
        self.done = min(self.done + count, self.total)
        now = time.monotonic()
        speed = self.done / max(now - self._start, 1e-9)
        told = f"{speed:,.0f} {self.unit}/s"
        self._progress.update(self._bar, completed=round(self.done), speed=told)
        if now - self._told >= _EVERY and not self.quiet and self._progress.disable:
            self._told = now
            left = timedelta(seconds=round((self.total - self.done) / speed))
            of = f"{round(self.done):,} of {self.total:,}"
            log.info("caching %s: %s, %s, %s left", self.what, of, told, left)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if error is None and not self.quiet:
            took = time.monotonic() - self._start
            speed = self.total / max(took, 1e-9)
            told = f"{self.total:,} {self.unit} in {took:.1f} s, {speed:,.0f} {self.unit}/s"
            log.info("cached %s: %s", self.what, told)
