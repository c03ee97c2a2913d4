"""The server without its wires: jobs come in, drawers draw their pictures, files tell the rest.

A drawer is a thread that draws one picture after the other; there are as many as fill a batch of
the network twice. No request changes anything for another one.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.models.rows import MOST_ROWS
from ldm.serving.draw import SEEDS, Draw
from ldm.serving.engine import Engine
from ldm.serving.gallery import Gallery
from ldm.serving.job import Job, Listener, State, Stopped
from ldm.serving.limits import Limits, Rate
from ldm.serving.queue import Queue
from ldm.serving.shelf import Shelf

log = logging.getLogger(__name__)

DRAWERS = MOST_ROWS
"""Pictures that are drawn at once: of guided ones twice what a batch holds."""


class Draining(Exception):
    """The server is about to end and takes nothing more."""


@dataclass
class Counts:
    """What a monitor is told of; callables, so that nothing here knows which.

    Args:
        rows: rows and seconds of an evaluation.
        ended: how a job ended, and its seconds from its coming.
    """

    rows: Callable[[int, float], None] = lambda rows, seconds: None
    ended: Callable[[str, float], None] = lambda state, seconds: None


@dataclass(eq=False)
class Service:
    """Jobs from their coming to their end, from ``start`` to ``close``.

    Args:
        shelf: what there is to draw with.
        folder: of the gallery.
        limits: of what is taken.
        device: where models compute.
        constant: whether all batches have one size (``Network``).
        counts: for a monitor.
    """

    shelf: Shelf
    folder: Path
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    constant: bool = False
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.gallery, self.rate = Gallery(self.folder), Rate()
        self.queue = Queue(self.limits, self.rate)
        self.jobs: dict[str, Job] = {}
        """Those that are not over."""
        self.draining = False
        self._engines: dict[str, Engine] = {}
        self._loading = threading.Lock()
        self._lock = threading.RLock()
        self._drawers: list[threading.Thread] = []
        self._listeners: list[Listener] = []

    def start(self) -> None:
        """Loads the first model, and goes on with what a server before this one has left.

        Raises:
            ValueError, OSError: the model cannot be read.
        """
        self._load(*self.shelf.model(None))
        for job in self.gallery.unfinished():
            if not job.kept:  # whoever waited for it is gone
                job.end(State.CANCELLED, "the server has ended before it was drawn")
                self.gallery.write(job)
            elif job.left():
                self._take(job, bounded=False)
            else:
                job.end(State.DONE)
                self.gallery.write(job)
        for number in range(DRAWERS):
            drawer = threading.Thread(target=self._draw, name=f"drawer-{number}", daemon=True)
            drawer.start()
            self._drawers.append(drawer)

    def drain(self) -> None:
        """From here on nothing is taken; what is drawn is drawn to its end, and so is what somebody
        waits for. What is kept waits for the next server.
        """
        self.draining = True
        self.queue.close()
        self._tell_places()  # whoever listens to what is kept need not wait
        with self._lock:
            every = tuple(self._listeners)
        for listener in every:
            listener.wake()

    def close(self) -> None:
        """Drains, and ends all threads."""
        self.drain()
        for drawer in self._drawers:
            drawer.join()
        for engine in self._engines.values():
            engine.network.close()

    def engine(self, name: str | None) -> Engine:
        """The model of this name, loaded when it is first asked for; ``NoSuch`` if there is none,
        ``ValueError`` where it cannot be read.
        """
        name, path = self.shelf.model(name)
        with self._loading:
            if name not in self._engines:
                try:
                    self._load(name, path)
                except (ValueError, OSError) as error:  # whose message names the path
                    log.warning("%s", " ".join(str(error).split()))
                    raise ValueError(f"the model {name!r} cannot be read") from None
            return self._engines[name]

    def _load(self, name: str, path: Path) -> None:
        log.info("loading %s", name)
        engine = Engine(
            name, path, self.shelf, self.device,
            constant=self.constant, seen=lambda *told: self.counts.rows(*told),
        )  # fmt: skip
        if not engine.exact:
            log.warning("%s: pictures depend on their company on this device", name)
        self._engines[name] = engine

    @property
    def exact(self) -> bool:
        """Whether company makes no difference, of all models that are loaded."""
        return all(engine.exact for engine in self._engines.values())

    def submit(self, draw: Draw, client: str, *, kept: bool) -> Job:
        """Takes what ``client`` asks for.

        Args:
            draw: what.
            client: whose.
            kept: whether it goes on when nobody listens.

        Raises:
            ValueError: it cannot be drawn, or is too much at any time; the message is one line.
            NoSuch: it names what there is not.
            Full: there is too much for now.
            Draining: nothing is taken any more.
        """
        if self.draining:
            raise Draining
        engine = self.engine(draw.model)
        seed = secrets.randbelow(SEEDS) if draw.seed is None else draw.seed
        draw = engine.how(draw.model_copy(update={"seed": seed, "model": engine.name}))
        work = engine.check(draw, self.limits)
        if work * draw.count > self.limits.work:
            raise ValueError(
                f"{draw.count} pictures of this size and so many steps are more than the queue"
                " holds: ask for fewer, smaller, or in fewer steps"
            )
        until = time.time() + (draw.deadline or self.limits.seconds)
        job = Job(draw, client, work, kept, until)
        self._take(job)
        return job

    def _take(self, job: Job, *, bounded: bool = True) -> None:
        if bounded:
            self.gallery.take(job)  # before anybody is told of it
        job.relay = self._relay
        with self._lock:
            self.jobs[job.id] = job
        try:
            self.queue.put(job, bounded=bounded)
        except BaseException:
            with self._lock:
                del self.jobs[job.id]
            self.gallery.forget(job)
            raise
        job.tell("taken", **self.told(job))
        self._tell_places()

    def listen(self, wake: Callable[[], None]) -> Listener:
        """One who is told what becomes of all jobs."""
        listener = Listener(wake)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """From here on it is told nothing."""
        with self._lock:
            self._listeners.remove(listener)

    def _relay(self, job: Job, kind: str, number: int, data: dict[str, Any]) -> None:
        with self._lock:
            every = tuple(self._listeners)
        for listener in every:
            listener.put(kind, f"{job.id} {number}", {"id": job.id} | data)

    def find(self, name: str) -> Job | None:
        """The job of this id, be it over; None: there is none."""
        with self._lock:
            found = self.jobs.get(name)
        return found or self.gallery.job(name)

    def cancel(self, job: Job) -> None:
        """Ends ``job``: at once if it waits, at its next evaluation if it is drawn."""
        job.stop()
        self.queue.remove(job)
        if not self.queue.drawing(job):
            self._end(job, State.CANCELLED)

    def interrupt(self, client: str) -> int:
        """Cancels what ``client`` has here; how many jobs that were."""
        with self._lock:
            own = [job for job in self.jobs.values() if job.client == client]
        for job in own:
            self.cancel(job)
        return len(own)

    def told(self, job: Job) -> dict[str, Any]:
        """What the API says of a job, with its place in the queue and its seconds."""
        before, ahead = self.queue.places().get(job.id, (None, 0.0))
        left = (len(job.left()) or 1) * job.work
        seconds = None if job.state.over else self.rate.seconds(ahead + left)
        return job.told() | {
            "place": before,
            "seconds": None if seconds is None else round(seconds, 1),
            "progress": {
                str(n): {"step": d, "steps": of} for n, (d, of) in [*job.progress.items()]
            },
            "preview": job.preview,
        }

    def _tell_places(self) -> None:
        places = self.queue.places()
        with self._lock:
            waiting = [self.jobs[name] for name in places if name in self.jobs]
        for job in waiting:
            before, ahead = places[job.id]
            seconds = self.rate.seconds(ahead + len(job.left()) * job.work)
            told = None if seconds is None else round(seconds, 1)
            job.tell("place", place=before, seconds=told)

    def _draw(self) -> None:
        while (taken := self.queue.take(lambda job: not job.kept)) is not None:
            job, number = taken
            if job.state is State.QUEUED:
                job.state = State.DRAWING
            self._tell_places()
            state, error = None, None
            start, busy = time.monotonic(), self.queue.work()
            try:
                self._picture(job, number)
            except Stopped:
                state = job.stopped
            except (ValueError, OSError) as failed:
                state, error = State.FAILED, " ".join(str(failed).split())[:500]
                log.warning("job %s: %s", job.id, error)
                error = error if isinstance(failed, ValueError) else "it could not be written"
            except Exception:  # a bug, or no memory: the other jobs go on
                state, error = State.FAILED, "an error of the server, see its log"
                log.exception("job %s", job.id)
            else:
                shared = min(DRAWERS, max(1.0, busy / job.work))
                self.rate.add(job.work, (time.monotonic() - start) / shared)
            self.queue.finished(job, number)
            if len(job.pictures) == job.draw.count:
                self._end(job, State.DONE)
            elif (state := state or job.stopped) is not None:
                job.stop(state)
                self.queue.remove(job)
                self._end(job, state, error)

    def _picture(self, job: Job, number: int) -> None:
        job.check()
        made = self.engine(job.draw.model).draw(job, number)
        name = self.gallery.add(job, number, made.image, made.parameters, made.beside)
        job.pictures[number] = name
        job.progress.pop(number, None)
        seed, other = job.draw.seeds(number)
        job.tell(
            "picture", number, picture=number, file=name, url=f"/api/pictures/{name}", seed=seed,
            variation_seed=other,
        )  # fmt: skip

    def _end(self, job: Job, state: State, error: str | None = None) -> None:
        if not job.end(state, error):
            return
        self.gallery.write(job)
        with self._lock:
            self.jobs.pop(job.id, None)
        self.counts.ended(str(state), time.time() - job.taken)
        job.tell("done", **self.told(job))
        self._tell_places()
