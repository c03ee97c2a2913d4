"""How much a server takes: sizes of one request, work in its queue, and how fast it is done.

    work = pictures x steps x (1 + guided) x pixels / pixels of the model's own size

is counted in rows of the network at the size that the model draws by default.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

_FADING = 0.9  # of what is known of the speed, at every picture


@dataclass(frozen=True)
class Limits:
    """Bounds of what is asked for.

    Args:
        count: pictures of a job.
        steps: of a sampler.
        side: pixels of either side.
        pixels: of a picture.
        text: characters of a prompt.
        body: bytes of a request.
        work: of all that waits; a job of more is refused for good.
        seconds: from a job's coming to its being given up, where it does not say.
        jobs: that may wait, however little work they are.
    """

    count: int = 16
    steps: int = 200
    side: int = 2048
    pixels: int = 1024 * 1024
    text: int = 10_000
    body: int = 32 * 2**20
    work: float = 20_000.0
    seconds: float = 3600.0
    jobs: int = 1000


class Full(Exception):
    """The queue takes no more for now.

    Args:
        seconds: after which there may be room.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = max(1, min(3600, math.ceil(seconds)))
        super().__init__(f"the queue is full: try again in {self.seconds} s")


def work(steps: int, *, guided: bool, pixels: int, own: int) -> float:
    """Of one picture of so many ``pixels``, of a model that draws ``own`` by default."""
    return steps * (2 if guided else 1) * pixels / own


class Rate:
    """Work a second, as it was measured of late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work, self._seconds = 0.0, 0.0

    def add(self, done: float, seconds: float) -> None:
        """So much was ``done`` in so many ``seconds``."""
        with self._lock:
            self._work = _FADING * self._work + done
            self._seconds = _FADING * self._seconds + seconds

    def seconds(self, ahead: float) -> float | None:
        """In which the work ``ahead`` is done; None: nothing was measured yet."""
        with self._lock:
            return ahead * self._seconds / self._work if self._work > 0 else None
