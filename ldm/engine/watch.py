"""Whether the other processes of a run answer and come further, and whether its launcher is there.

A collective waits for the slowest process, for a day if it must (``ldm.engine.shutdown.WAIT``): one
of them may be filling a cache, or drawing. So a thread of each tells the others, by the store that
they met at, that it lives and how far its process is; and a second one ends the process, with a
line that names the culprit, where

    a process has not answered for ``SILENT`` seconds: it is stopped, or its machine is;
    all are inside a step, and none has come further for ``patience()``: those behind hang.

Outside of steps a process may take its time as long as it answers. Time in which this process was
stopped itself does not count.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NoReturn

from ldm.errors import ConfigError

log = logging.getLogger(__name__)

SILENT = 300.0
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what launchers set
_AGAIN = "the same command goes on from the newest checkpoint"


def patience() -> float:
    """Seconds that a step, or the reading of a batch, may take: ``$LDM_TIMEOUT``, or half an hour.

    Raises:
        ConfigError: the variable is no number of seconds.
    """
    text = os.environ.get("LDM_TIMEOUT") or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e7:
        raise ConfigError(f"LDM_TIMEOUT is {text!r}: give a number of seconds")
    return seconds


@dataclass
class Word:
    """What a process tells of itself."""

    host: str
    pid: int
    beats: int = 0
    marks: int = 0  # how far it is
    inside: bool = False  # a step
    over: str = ""  # "done" or "failed" where it is about to end

    def sent(self) -> str:
        """As JSON."""
        return json.dumps(vars(self))


class Table:
    """The last words of all processes, and for how long each has said nothing new."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.silence: list[float] = []  # seconds since it answered
        self.pause: list[float] = []  # seconds since it came further

    def take(self, words: Sequence[Word], passed: float) -> None:
        """Takes in what all say ``passed`` seconds after the last time."""
        before = self.words
        if not before:
            self.silence, self.pause = [0.0] * len(words), [0.0] * len(words)
        for rank, (old, new) in enumerate(zip(before, words, strict=False)):
            self.silence[rank] = 0.0 if new.beats != old.beats else self.silence[rank] + passed
            self.pause[rank] = 0.0 if new.marks != old.marks else self.pause[rank] + passed
        self.words = list(words)

    def silent(self, longer: float) -> list[int]:
        """Processes that should answer, and have not for ``longer`` seconds."""
        return [r for r, w in enumerate(self.words) if not w.over and self.silence[r] > longer]

    def failed(self, longer: float) -> list[int]:
        """Processes that ended with an error more than ``longer`` seconds ago."""
        every = enumerate(self.words)
        return [r for r, w in every if w.over == "failed" and self.silence[r] > longer]

    def hung(self, longer: float) -> list[int]:
        """Processes that all wait for, where none has come further for ``longer`` seconds."""
        if not all(w.inside and not w.over for w in self.words) or min(self.pause) <= longer:
            return []
        least = min(word.marks for word in self.words)
        return [rank for rank, word in enumerate(self.words) if word.marks == least]

    def told_already(self) -> bool:
        """Whether a process ended with an error, which it has told."""
        return any(word.over == "failed" for word in self.words)

    def first(self, ranks: Sequence[int]) -> int | None:
        """The process that tells that ``ranks`` are at fault; None: another has told already."""
        rest = [r for r, w in enumerate(self.words) if r not in ranks and not w.over]
        return None if self.told_already() else (rest or [0])[0]

    def told(self, ranks: Sequence[int]) -> str:
        """Rank, host and process of each."""
        some = [f"rank {r} (process {self.words[r].pid} on {self.words[r].host})" for r in ranks]
        return ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")


class Watch:
    """The watch of this process; ``start`` begins it. Until then it watches nothing."""

    def __init__(self) -> None:
        self.rank, self.interval, self.silent = 0, 1.0, SILENT
        self.word = Word(socket.gethostname(), os.getpid())
        self.table = Table()
        self._store: Any = None
        self._words: list[Word] = []
        self._rounds, self._lost = 0, False
        self._parent: int | None = None
        self._hurry = threading.Event()
        self._ended = False

    def start(self, rank: int, world: int) -> None:
        """Watches the other processes and the launcher, as far as there are any.

        Raises:
            ConfigError: ``LDM_TIMEOUT`` is no number of seconds.
        """
        self.word.pid, self.rank = os.getpid(), rank
        self.patience = patience()
        self.silent = min(SILENT, self.patience)
        # Many processes ask one store.
        self.interval = max(1.0, world / 64)
        if any(name in os.environ for name in _LAUNCHED):
            self._parent = os.getppid()
        if world > 1:
            from torch import distributed  # the command line is read before torch is imported

            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore("ldm watch", store.clone())
            thread = threading.Thread(target=self._exchange, args=(world,), daemon=True)
            thread.start()
            atexit.register(self._leave_with, thread)
        if world > 1 or self._parent is not None:
            threading.Thread(target=self._judge, daemon=True).start()

    # -- what the process says --

    def mark(self) -> None:
        """It is inside a step, and has come further."""
        self.word.marks += 1
        self.word.inside = True

    def rest(self) -> None:
        """It is outside of steps, for as long as it likes."""
        self.word.marks += 1
        self.word.inside = False

    def leave(self, over: str) -> None:
        """It is about to end: ``done``, or ``failed``.

        Returns once that is in the store. The others have the time to read of a failure, and what
        is in a store that ends with this process.
        """
        if self._store is None or self.word.over or self._lost:
            return
        self.word.over, before = over, self._rounds
        self._hurry.set()
        for _ in range(20):
            if self._rounds > before + 1 or self._lost:
                return
            time.sleep(self.interval / 10)
            if over == "done" and not self._keeps_store():
                self._hurry.set()

    def _leave_with(self, thread: threading.Thread) -> None:
        """Leaves, and waits for the ``thread`` that asks the store: one that the interpreter stops
        in the middle of that aborts the process.
        """
        self.leave("done")
        self._ended = True
        self._hurry.set()
        thread.join(5 * self.interval)

    def _keeps_store(self) -> bool:
        """Whether the store ends with this process: that of torchrun is its agent's."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def lost(self) -> str:
        """The line about a collective that failed as a process is gone; "" if another tells it."""
        gone: list[int] = []
        for _ in range(8):  # seconds in which one that is gone falls silent
            gone = self.table.silent(3 * self.interval)
            if gone or self._lost or self.table.told_already():
                break
            time.sleep(self.interval)
        gone = gone or [0] * self._lost * bool(self.table.words)  # the one that kept the store
        if self.rank != self.table.first(gone):
            return ""
        if not gone:
            return "another process of the run has ended, and what it said before tells why"
        killed = "it was killed, by hand or because memory ran out (dmesg tells)"
        return f"{self.table.told(gone)} is gone without a word: {killed}; {_AGAIN}"

    # -- what its threads do --

    def _exchange(self, world: int) -> None:
        keys = [str(rank) for rank in range(world)]
        try:
            while not self._ended:
                self.word.beats += 1
                self._store.set(keys[self.rank], self.word.sent())
                if self._words or self._store.check(keys):
                    every = self._store.multi_get(keys)
                    self._words = [Word(**json.loads(word)) for word in every]
                self._rounds += 1
                self._hurry.wait(self.interval)
                self._hurry.clear()
        except RuntimeError:  # it went with the process that kept it: the collectives will tell
            self._lost = True

    def _judge(self) -> None:
        before, rounds, passed = time.monotonic(), 0, 0.0
        while True:
            time.sleep(self.interval)
            now = time.monotonic()
            passed += min(now - before, 2 * self.interval)  # the rest it was stopped itself
            before = now
            self._ask_parent()
            if self._store is None or self._lost:
                continue
            if self._rounds == rounds:
                if passed > self.silent and self.table.words:
                    self._end([0], f"{self.table.told([0])}, or its launcher, does not answer")
                continue
            rounds = self._rounds
            if self._words:
                self.table.take(self._words, passed)
                self._find()
            passed = 0.0

    def _ask_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            log.warning("the launcher has ended: the run stops as on SIGTERM")
            os.kill(os.getpid(), signal.SIGTERM)

    def _find(self) -> None:
        table = self.table
        if ranks := table.silent(self.silent):
            why = f"has not answered for {self.silent:.0f} seconds: it is stopped, or its machine"
            self._end(ranks, f"{table.told(ranks)} {why}; end what is left of it, and {_AGAIN}")
        # A process that is behind in reading says so itself: it is given the time to.
        elif ranks := table.hung(1.1 * self.patience + 5):
            why = f"has come no further for {self.patience:.0f} seconds, and the others wait for it"
            then = f"see what it does (py-spy dump); {_AGAIN} (LDM_TIMEOUT sets the seconds)"
            self._end(ranks, f"{table.told(ranks)} {why}: {then}")
        elif ranks := table.failed(self.silent):
            self._end(ranks, "")

    def _end(self, ranks: Sequence[int], line: str) -> NoReturn:
        """Ends this process; the first of those that are not at fault tells why, if none has."""
        if self.rank == self.table.first(ranks):
            print(f"error: {line}", file=sys.stderr, flush=True)
            leave_note(line)
        else:
            time.sleep(3 * self.interval)  # after its line
        for child in active_children():  # what reads pictures
            child.kill()
        os._exit(2)


def leave_note(line: str) -> None:
    """Gives ``line`` to ``torchrun``, which shows it behind its own traceback: it comes last."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        note = {"message": {"message": line, "extraInfo": extra}}
        Path(file).write_text(json.dumps(note), encoding="utf-8")


WATCH = Watch()
"""Of this process."""
