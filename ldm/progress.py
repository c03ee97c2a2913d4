"""How far long work is: a bar on a terminal, elsewhere a line every half minute.

    training: 12,800 of 64,000 images, loss 0.1234, 91 images/s, 0:09:23 left

Only the main process of a run tells. Lines are log records of ``ldm.progress``, which ``listen``
sends to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines."""
_WORTH = 1.0  # seconds that work takes of which is told at its end how long it took


def main_process() -> bool:
    """Whether this is the main process of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class _Lines(logging.Handler):
    """Writes to what stderr is at the time: a bar that is shown there puts lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except OSError:
            self.handleError(record)


def listen(name: str = "ldm") -> None:
    """Sends warnings to stderr, and from the main process what loggers below ``name`` tell."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Lines()]
    )
    if main_process():
        logging.getLogger(name).setLevel(logging.INFO)


class Progress:
    """Tells how much of ``total`` is done, how fast, and when the rest will be.

    Args:
        what: is done, ``training``.
        unit: of what is counted, in the plural.
        total: how many there will be; None: not known.
        done: how many there are already.
    """

    _bars: Any = None  # on the terminal: work within work is one more line of it
    _depth = 0

    def __init__(self, what: str, unit: str, total: float | None, *, done: float = 0) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.done = self.began = done
        self.note = ""  # shown beside the numbers

    def __enter__(self) -> Progress:
        self._start = self._told = time.monotonic()
        Progress._depth += 1
        self._bar = None
        if main_process() and sys.stderr.isatty():
            if self._bars is None:
                Progress._bars = _bars()
                self._bars.start()
            self._bar = self._bars.add_task(
                self.what, total=self.total, completed=self.done, note="", rate=""
            )
        return self

    def advance(self, count: float = 1) -> None:
        """``count`` more are done."""
        self.done += count
        if self.total is not None:
            self.done = min(self.done, self.total)
        now = time.monotonic()
        if self._bar is not None:
            self._bars.update(
                self._bar, completed=_whole(self.done), note=self.note, rate=self._rate(now)
            )
        elif now - self._told >= EVERY and main_process():
            self._told = now
            of = f"{_whole(self.done):,}" + (
                f" of {self.total:,}" if self.total is not None else ""
            )
            told = [f"{of} {self.unit}", self.note, self._rate(now), self._left(now)]
            log.info("%s: %s", self.what, ", ".join(filter(None, told)))

    def _speed(self, now: float) -> float:
        return (self.done - self.began) / max(now - self._start, 1e-9)

    def _rate(self, now: float) -> str:
        speed = self._speed(now)
        return f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s"

    def _left(self, now: float) -> str:
        speed = self._speed(now)
        if self.total is None or not speed:
            return ""
        return f"{timedelta(seconds=round((self.total - self.done) / speed))} left"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Progress._depth -= 1
        outermost = not Progress._depth
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            if outermost:
                self._bars.stop()
                Progress._bars = None
        now = time.monotonic()
        took = now - self._start
        if error is None and took >= _WORTH and outermost and main_process():
            made = f"{_whole(self.done - self.began):,} {self.unit} in {_time(took)}"
            log.info("%s: %s, %s", self.what, made, self._rate(now))


def track(
    items: Iterable[T], what: str, unit: str = "pictures", *, total: int | None = None
) -> Iterator[T]:
    """``items``, counted as they are used; ``total`` where they have no length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(what, unit, total) as progress:
        for item in items:
            yield item
            progress.advance()


def _whole(count: float) -> int:
    """How many are done: parts of one add up to a little less."""
    return int(count + 1e-6)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # to where it would go: a log file stays one
    )
