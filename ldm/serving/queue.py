"""Pictures that wait: bounded in work, and one of every client in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ldm.serving.job import Job
from ldm.serving.limits import Full, Limits, Rate


class Queue:
    """Jobs whose pictures wait to be drawn, a client after the other.

    Args:
        limits: of its work.
        rate: at which that is done.
    """

    def __init__(self, limits: Limits, rate: Rate) -> None:
        self._limits, self._rate = limits, rate
        self._changed = threading.Condition()
        self._jobs: dict[str, deque[Job]] = {}
        self._turns: deque[str] = deque()
        self._drawing: dict[tuple[str, int], float] = {}
        self._closed = False

    def put(self, job: Job, *, bounded: bool = True) -> None:
        """Takes ``job``, to be drawn after what is here by turns.

        Args:
            job: of pictures that are left.
            bounded: False takes it however much there is.

        Raises:
            Full: there is too much.
        """
        with self._changed:
            more = len(job.left()) * job.work
            jobs = sum(map(len, self._jobs.values()))
            over = self._work() + more - self._limits.work
            if bounded and (over > 0 or jobs >= self._limits.jobs):
                raise Full(self._rate.seconds(max(over, job.work)) or 1.0)
            self._jobs.setdefault(job.client, deque()).append(job)
            if job.client not in self._turns:
                self._turns.append(job.client)
            self._changed.notify()

    def take(self, wanted: Callable[[Job], bool] = lambda job: True) -> tuple[Job, int] | None:
        """The next picture, when there is one; None when the queue is closed, and nothing that is
        ``wanted`` is left.
        """
        with self._changed:
            while True:
                for _ in range(len(self._turns)):
                    client = self._turns.popleft()
                    found = self._of(client, wanted if self._closed else lambda job: True)
                    if self._jobs[client]:
                        self._turns.append(client)
                    else:
                        del self._jobs[client]
                    if found is not None:
                        job, number = found
                        self._drawing[job.id, number] = job.work
                        return found
                if self._closed:
                    return None
                self._changed.wait()

    def _of(self, client: str, wanted: Callable[[Job], bool]) -> tuple[Job, int] | None:
        jobs = self._jobs[client]
        for job in tuple(jobs):
            numbers = job.left()
            if not numbers or job.state.over:
                jobs.remove(job)
            elif wanted(job):
                job.next = numbers[0] + 1
                if len(numbers) == 1:
                    jobs.remove(job)
                return job, numbers[0]
        return None

    def finished(self, job: Job, number: int) -> None:
        """A picture that was taken is drawn, or is not going to be."""
        with self._changed:
            del self._drawing[job.id, number]

    def drawing(self, job: Job) -> bool:
        """Whether one of its pictures is being drawn."""
        with self._changed:
            return any(name == job.id for name, _ in self._drawing)

    def remove(self, job: Job) -> None:
        """Takes it out again."""
        with self._changed:
            jobs = self._jobs.get(job.client, deque())
            if job in jobs:
                jobs.remove(job)

    def close(self) -> None:
        """From here on ``take`` gives what it wants, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def work(self) -> float:
        """Of all that waits or is being drawn."""
        with self._changed:
            return self._work()

    def _work(self) -> float:
        waiting = sum(len(j.left()) * j.work for jobs in self._jobs.values() for j in jobs)
        return waiting + sum(self._drawing.values())

    def places(self) -> dict[str, tuple[int, float]]:
        """Of every job that waits, by its id, how many pictures and how much work are before its
        next one, as turns go now.
        """
        with self._changed:
            rest = {c: deque((j, len(j.left())) for j in self._jobs[c]) for c in self._turns}
            turns = deque(self._turns)
            found: dict[str, tuple[int, float]] = {}
            before, ahead = 0, sum(self._drawing.values())
            while turns:
                client = turns.popleft()
                if not rest[client]:
                    continue
                job, left = rest[client].popleft()
                if left:
                    found.setdefault(job.id, (before, ahead))
                    before, ahead = before + 1, ahead + job.work
                if left > 1:
                    rest[client].appendleft((job, left - 1))
                turns.append(client)
            return found
