"""What all APIs do with jobs: who asks, how one is taken, waited for, and told of as it goes on."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from ldm.serving.draw import Draw
from ldm.serving.job import Job, State
from ldm.serving.service import Service

RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "What was sent cannot be read, or a host or an origin is not this one."},
    401: {"description": "The key is missing or wrong."},
    404: {"description": "There is nothing of this name."},
    413: {"description": "The body is larger than the server takes."},
    422: {"description": "Something that is asked for cannot be drawn; the message says what."},
    429: {"description": "The queue is full; Retry-After says for how long."},
    503: {"description": "The server is about to end, or just began; ask another or again."},
    504: {"description": "The deadline has passed before it was drawn."},
}
"""What every route may answer."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}
}
"""What a route answers that tells of events."""

_CLIENT = re.compile(r"[\w.-]{1,64}")
_QUIET = 15.0  # seconds after which a stream says that it is still there
_STILL = ": still here\n\n"
_LOOK = 0.5  # seconds between looks whether a client is still there


class ClientGone(Exception):
    """Whoever asked does not wait any more."""


def service_of(request: Request) -> Service:
    """The service behind the app."""
    return request.app.state.service


def client_of(request: Request) -> str:
    """Who asks: what the header ``X-Client`` says, else the address."""
    named = request.headers.get("x-client", "")
    host = request.client.host if request.client else "nobody"
    return f"named:{named}" if _CLIENT.fullmatch(named) else f"at:{host}"


async def submitted(request: Request, draw: Draw, *, kept: bool) -> Job:
    """The job of ``draw``; the errors of ``Service.submit``."""
    service = service_of(request)
    return await run_in_threadpool(service.submit, draw, client_of(request), kept=kept)


async def finished(request: Request, job: Job) -> Job:
    """``job`` when it is done; one whose client goes is cancelled.

    Raises:
        HTTPException: it ended otherwise.
        ClientGone: nobody waits any more.
    """
    service, woken = service_of(request), asyncio.Event()
    listener = job.listen(_wakes(woken))
    try:
        while not job.state.over:
            with suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), _LOOK)
            woken.clear()
            if not job.state.over and await request.is_disconnected():
                raise ClientGone
    finally:
        job.leave(listener)
        if not job.state.over:
            await run_in_threadpool(service.cancel, job)
    if job.state is not State.DONE:
        raise ended_otherwise(job)
    return job


def ended_otherwise(job: Job) -> HTTPException:
    """What is said of a job that has no pictures to show."""
    status = {State.FAILED: 422, State.EXPIRED: 504, State.CANCELLED: 409}[job.state]
    usual = {
        State.EXPIRED: "its deadline has passed before it was drawn",
        State.CANCELLED: "it was cancelled",
    }
    return HTTPException(status, job.error or usual.get(job.state, "it failed"))


async def events(service: Service, job: Job) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """What becomes of ``job``: at once ``state``, all that there is to say, and from there on each
    kind as it comes, to ``done``. A job that nobody keeps is cancelled when nobody listens any
    more. ``("", {})`` says that nothing has happened for a while.
    """
    woken = asyncio.Event()
    listener = job.listen(_wakes(woken))
    try:
        yield "state", await run_in_threadpool(service.told, job)
        if job.state.over:
            yield "done", await run_in_threadpool(service.told, job)
            return
        while True:
            try:
                await asyncio.wait_for(woken.wait(), _QUIET)
            except TimeoutError:
                yield "", {}
            woken.clear()
            for kind, data in listener.take():
                yield kind, data
                if kind == "done":
                    return
            if service.draining and job.kept and not service.queue.drawing(job):
                return  # the next server goes on with it
    finally:
        if job.leave(listener) == 0 and not job.kept and not job.state.over:
            service.cancel(job)


async def all_events(service: Service) -> AsyncIterator[str]:
    """What becomes of all jobs, as server-sent events that say the ``id`` of their job: at once
    ``state``, those that wait or are drawn, and from there on ``taken`` of those that come, and
    each kind of ``events``.
    """
    woken = asyncio.Event()
    listener = service.listen(_wakes(woken))
    try:
        jobs = [*service.jobs.values()]
        told = await run_in_threadpool(lambda: [service.told(job) for job in jobs])
        yield event("state", {"jobs": told})
        while not service.draining:
            try:
                await asyncio.wait_for(woken.wait(), _QUIET)
            except TimeoutError:
                yield _STILL
            woken.clear()
            for kind, data in listener.take():
                yield event(kind, data)
    finally:
        service.leave(listener)


async def sent(service: Service, job: Job) -> AsyncIterator[str]:
    """``events`` as server-sent events."""
    async for kind, data in events(service, job):
        yield event(kind, data) if kind else _STILL


def event(kind: str, data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _wakes(woken: asyncio.Event) -> Any:
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):  # a loop that is closed: nobody listens
            loop.call_soon_threadsafe(woken.set)

    return wake
