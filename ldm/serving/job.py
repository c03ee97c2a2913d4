"""A job: pictures of one request, from its coming to its end, and who listens to it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ldm.serving.draw import Draw

_FIRST = (
    "taken",
    "place",
    "step",
    "preview",
    "picture",
    "done",
)  # the order in which they are told


class State(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    DRAWING = "drawing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self not in (State.QUEUED, State.DRAWING)


class Stopped(Exception):
    """A job is not drawn any further."""


def new_id() -> str:
    """A name that sorts by time, and that nobody guesses."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


class Listener:
    """What a job tells one who listens: of every kind the latest, so that a slow one neither holds
    up the job nor fills memory.

    Args:
        wake: is called, in any thread, when there is something.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._events: dict[tuple[str, str], dict[str, Any]] = {}
        self.wake = wake

    def put(self, kind: str, of: str, data: dict[str, Any]) -> None:
        """Tells it ``data``, in place of what of this kind and thing was not yet heard."""
        with self._lock:
            self._events[kind, of] = data
        self.wake()

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """All that was not heard yet."""
        with self._lock:
            found, self._events = self._events, {}
        ordered = sorted(found.items(), key=lambda each: _FIRST.index(each[0][0]))
        return [(kind, data) for (kind, _), data in ordered]


@dataclass(eq=False)
class Job:
    """Pictures of one request.

    Args:
        draw: what is asked for, with its seed and its model.
        client: whose it is.
        work: of each picture.
        kept: whether it goes on when nobody listens.
        id: its name.
        taken: when it came, seconds since 1970.
        until: when it is given up.
        state: how far it is.
        error: why it failed, one line.
    """

    draw: Draw
    client: str
    work: float
    kept: bool
    until: float
    id: str = field(default_factory=new_id)
    taken: float = field(default_factory=time.time)
    state: State = State.QUEUED
    error: str | None = None
    pictures: dict[int, str] = field(default_factory=dict)
    """Names of the files that there are, by number."""
    next: int = 0
    """Number of the picture that is drawn next."""
    progress: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Evaluations that are done, and all of them, of pictures that are being drawn."""
    preview: str | None = None
    """The last one, a data: URL."""
    relay: Callable[[Job, str, int, dict[str, Any]], None] | None = None
    """Is told all that listeners are."""
    _wanted: State | None = None
    _listeners: list[Listener] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def check(self) -> None:
        """``Stopped`` where it is not to be drawn any further."""
        if time.time() > self.until:
            self.stop(State.EXPIRED)
        if self._wanted is not None:
            raise Stopped(self._wanted)

    def stop(self, state: State = State.CANCELLED) -> None:
        """Asks that it end so; the first who asks is heard."""
        with self._lock:
            if self._wanted is None and not self.state.over:
                self._wanted = state

    @property
    def stopped(self) -> State | None:
        """What it is asked to end as."""
        return self._wanted

    def left(self) -> list[int]:
        """Numbers of pictures that nobody has begun."""
        numbers = range(self.next, self.draw.count)
        return [number for number in numbers if number not in self.pictures]

    def listen(self, wake: Callable[[], None]) -> Listener:
        """One who is told what becomes of it from here on."""
        listener = Listener(wake)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> int:
        """How many go on listening when ``listener`` has gone."""
        with self._lock:
            self._listeners.remove(listener)
            return len(self._listeners)

    def tell(self, kind: str, number: int = 0, **data: Any) -> None:
        """Tells all who listen."""
        with self._lock:
            every = tuple(self._listeners)
        for listener in every:
            listener.put(kind, str(number), data)
        if self.relay is not None:
            self.relay(self, kind, number, data)

    def step(self, number: int, done: int, of: int) -> None:
        """Of picture ``number`` so many evaluations are done."""
        self.progress[number] = done, of
        self.tell("step", number, picture=number, step=done, steps=of)

    def shown(self, number: int, done: int, url: str) -> None:
        """A preview of picture ``number``."""
        self.preview = url
        self.tell("preview", number, picture=number, step=done, image=url)

    def end(self, state: State, error: str | None = None) -> bool:
        """Ends it; False where it is over already."""
        with self._lock:
            if self.state.over:
                return False
            self.state, self.error = state, error
            self.preview = None
            self.progress.clear()
        return True

    def told(self) -> dict[str, Any]:
        """What the API says of it."""
        seeds = [self.draw.seeds(n) for n in range(self.draw.count)]
        pictures = [
            {
                "number": number,
                "seed": seed,
                "variation_seed": other,
                "file": (name := self.pictures.get(number)),
                "url": None if name is None else f"/api/pictures/{name}",
            }
            for number, (seed, other) in enumerate(seeds)
        ]
        settings = self.draw.model_dump(exclude={"image", "mask", "deadline", "previews"})
        return {
            "id": self.id,
            "state": str(self.state),
            "error": self.error,
            "taken": self.taken,
            "settings": settings,
            "edited": {"image": self.draw.image is not None, "mask": self.draw.mask is not None},
            "pictures": pictures,
        }
