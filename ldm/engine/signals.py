"""Signals that ask a run to end: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1, which Slurm can send some
time before its limit.

The first one is kept until the training loop comes to the end of a step, saves and leaves; outside
the loop, where everything is written in one step, it ends the program at once. A second one does
what the signal does by default. A launcher hands a signal on to processes that the terminal or
Slurm has already sent it to: what comes within ``ECHO`` seconds of the first is the same request.

Python acts on a signal between two of its own instructions, so one that comes during a long call of
C (a collective that waits for another process) is acted on when that returns; where the other
process was asked to end as well, the collective fails as soon as that is gone, and this ends too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a run that was asked to stop: ``EX_TEMPFAIL``, "run the same command again"."""
ECHO = 2.0
SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]


class Interrupted(BaseException):
    """The run was asked to stop and has stopped; the message is one line, or empty where another
    process tells it. Not an ``Exception``: no library may take it for a failure of its own.
    """


class Requests:
    """Listens for ``SIGNALS``; ``by`` is the name of the first one that came.

    A signal that was ignored when the program started (``nohup``) stays ignored, and outside the
    main thread, where Python has no handlers, nothing is heard.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self.at_once, self.since = True, 0.0
        self.by: str | None = None

    def listen(self) -> None:
        """From now on one ends the program at once, by ``Interrupted``."""
        if threading.current_thread() is threading.main_thread():
            heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self.before = {s: signal.signal(s, self._caught) for s in heard}

    def rest(self) -> None:
        """Gives the signals back, and forgets."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}
        self._forget()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, one is only kept. It stays so when an error leaves this: the program is about to
        tell it, and the launcher sends signals as soon as one of its processes is gone.
        """
        borrowed = not self.before
        if borrowed:
            self.listen()
        self.at_once = False
        try:
            yield
            self.at_once = True
        finally:
            self.since = time.monotonic()
            if borrowed:
                self.rest()

    def _caught(self, number: int, _: FrameType | None) -> None:
        if self.by is None:
            self.by, self.since = signal.Signals(number).name, time.monotonic()
            if self.at_once:
                raise Interrupted(
                    f"{self.by} came outside the training loop; what is written is whole: run the"
                    " same command again to go on"
                )
        elif time.monotonic() - self.since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


REQUESTS = Requests()
"""Of this process: a process has one handler of a signal."""
