"""The server's own API, which its page uses as everybody else may: jobs, events, pictures, and what
there is to draw with.
"""

import io
import json
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ldm.formats.png import Parameters, read_beside, read_text
from ldm.sampling.names import canonical
from ldm.serving.api.waiting import (
    RESPONSES,
    STREAM,
    all_events,
    sent,
    service_of,
    submitted,
)
from ldm.serving.draw import Draw, Picture, content
from ldm.serving.job import Job
from ldm.serving.pictures import bounded

_STREAM = "text/event-stream"
_UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_Id = Annotated[str, Path(pattern=r"^[0-9a-f]{28}$")]


class Text(BaseModel):
    """A text whose tokens are counted."""

    model_config = ConfigDict(strict=True, extra="forbid")
    text: str = Field(max_length=100_000)
    syntax: Literal["a1111"] | None = None
    model: str | None = Field(None, max_length=200)


class Dropped(BaseModel):
    """A picture whose settings are asked for."""

    model_config = ConfigDict(strict=True, extra="forbid")
    image: Picture


def router(asked: type[Draw]) -> APIRouter:
    """The routes; ``asked`` is what a job may ask for."""
    routes = APIRouter(prefix="/api", tags=["native"], responses=RESPONSES)

    @routes.get("/info")
    async def info(request: Request, model: Annotated[str | None, Query()] = None) -> Any:
        """What there is to draw with: models, samplers, LoRAs, limits; of one model its size,
        its steps, guidance and sampler.
        """
        return await run_in_threadpool(_info, request, model)

    @routes.post("/jobs", status_code=202, responses=STREAM)
    async def take(request: Request, draw: asked) -> Any:
        """Takes a job, which is kept whether or not anybody listens. With ``Accept:
        text/event-stream`` its events come as the answer, and it ends when the client goes.
        """
        streamed = _STREAM in request.headers.get("accept", "")
        job = await submitted(request, draw, kept=not streamed)
        service = service_of(request)
        if streamed:
            return StreamingResponse(sent(service, job), 200, _UNCACHED, _STREAM)
        return await run_in_threadpool(service.told, job)

    @routes.get("/jobs")
    async def listed(
        request: Request,
        before: Annotated[str | None, Query(pattern=r"^[0-9a-f]{28}$")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Any:
        """Jobs, the newest first, those that are over among them; ``next`` is the ``before`` of
        those that follow, null at the end.
        """
        return await run_in_threadpool(_listed, request, before, limit)

    @routes.get("/jobs/{name}")
    async def one(request: Request, name: _Id) -> Any:
        """A job."""
        return await run_in_threadpool(service_of(request).told, await _found(request, name))

    @routes.get("/jobs/{name}/events", response_class=StreamingResponse, responses=STREAM)
    async def told(request: Request, name: _Id) -> StreamingResponse:
        """What becomes of a job: ``state`` at once, then ``place``, ``step``, ``preview``,
        ``picture``, and ``done`` at its end.
        """
        job = await _found(request, name)
        return StreamingResponse(sent(service_of(request), job), 200, _UNCACHED, _STREAM)

    @routes.get("/events", response_class=StreamingResponse, responses=STREAM)
    async def everything(request: Request) -> StreamingResponse:
        """What becomes of all jobs, on one connection: ``state`` at once, ``taken`` when one comes,
        and the events of each, which say its ``id``.
        """
        return StreamingResponse(all_events(service_of(request)), 200, _UNCACHED, _STREAM)

    @routes.delete("/jobs/{name}")
    async def cancel(request: Request, name: _Id) -> Any:
        """Cancels a job; what is drawn of it stays, and one that is over is as it is."""
        job, service = await _found(request, name), service_of(request)
        await run_in_threadpool(service.cancel, job)
        return await run_in_threadpool(service.told, job)

    @routes.get("/pictures/{name}", response_class=FileResponse)
    async def picture(request: Request, name: Annotated[str, Path(max_length=100)]) -> FileResponse:
        """A picture, a PNG that carries its parameters."""
        file = service_of(request).gallery.picture(name)
        if file is None:
            raise HTTPException(404, "there is no such picture")
        forever = {"Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(file, media_type="image/png", headers=forever)

    @routes.post("/tokens")
    async def tokens(request: Request, text: Text) -> Any:
        """How many tokens a text is to each text tower, how many that reads at a time, and in how
        many windows.
        """

        def counted() -> Any:
            engine = service_of(request).engine(text.model)
            return {"towers": engine.tokens(text.text, text.syntax)}

        return await run_in_threadpool(counted)

    @routes.post("/settings")
    async def settings(dropped: Dropped) -> Any:
        """What a picture says of how it was drawn, by the names of settings of a job, and its
        text.
        """
        return await run_in_threadpool(settings_of, content(dropped.image))

    return routes


async def _found(request: Request, name: str) -> Job:
    job = await run_in_threadpool(service_of(request).find, name)
    if job is None:
        raise HTTPException(404, "there is no such job")
    return job


def _info(request: Request, model: str | None) -> dict[str, Any]:
    service = service_of(request)
    engine, limits = service.engine(model), service.limits
    how = engine.pipe.sampling_defaults
    return {
        "models": [*service.shelf.models],
        "model": {
            "name": engine.name,
            "width": engine.width,
            "height": engine.height,
            "multiple": engine.unit,
            "steps": how.num_inference_steps,
            "guidance": how.guidance_scale,
            "sampler": how.sampler,
            "classes": engine.pipe.reads,
            "exact": engine.exact,
        },
        "samplers": [*engine.samplers, "model"],
        "loras": [*service.shelf.loras()],
        "pages": request.app.state.pages,
        "limits": {
            "count": limits.count,
            "steps": limits.steps,
            "side": limits.side,
            "pixels": limits.pixels,
            "text": limits.text,
            "body": limits.body,
        },
    }


def _listed(request: Request, before: str | None, limit: int) -> dict[str, Any]:
    service, found = service_of(request), list[dict[str, Any]]()
    last = None
    for name in service.gallery.ids(before):
        if len(found) == limit:
            return {"jobs": found, "next": last}
        last = name
        if (job := service.find(name)) is not None:
            found.append(service.told(job))
    return {"jobs": found, "next": None}


def settings_of(data: bytes) -> dict[str, Any]:
    """What the file of a picture says of how it was drawn.

    Raises:
        ValueError: it is none, or says nothing.
    """
    bounded(data, "image")
    try:
        text, own = read_text(io.BytesIO(data)), read_beside(io.BytesIO(data))  # type: ignore[arg-type]
    except (OSError, ValueError):
        raise ValueError("it is no picture that can be read, or what it carries is damaged") from (
            None
        )
    if text is None:
        raise ValueError("the picture carries no parameters: nothing says how it was drawn")
    told = Parameters.parse(text)
    found: dict[str, Any] = {
        "prompt": told.prompt,
        "negative": told.negative,
        "seed": told.seed,
        "steps": told.steps,
        "guidance": told.guidance,
        "guidance_rescale": told.rescale,
        "sampler": _sampler(told.sampler),
        "width": told.width,
        "height": told.height,
        "strength": told.strength,
        "variation_seed": told.variation_seed,
        "variation_strength": told.variation_strength,
        "syntax": "a1111" if own is None else None,
    }
    if own is not None:
        found |= {name: own[name] for name in own.keys() & Draw.model_fields.keys()}
        found["loras"] = [
            {"name": pair[0], "weight": pair[1]}
            for pair in own.get("loras", [])
            if isinstance(pair, list) and len(pair) == 2
        ]
    edited = None if own is None else own.get("edited")
    if own is not None and isinstance(edited, dict) and "mask_crop" in edited:
        size = _SIZE.fullmatch(str(own.get("size")))  # of what was drawn, not of the picture
        found["width"], found["height"] = map(int, size.groups()) if size else (None, None)
    kept = {name: value for name, value in found.items() if value not in (None, [])}
    return {"settings": kept, "model": told.model, "edited": edited, "text": json_safe(text)}


def _sampler(name: str | None) -> str | None:
    try:
        return None if name is None else canonical(name)
    except ValueError:
        return None


def json_safe(text: str) -> str:
    """``text`` as JSON in UTF-8 can hold it."""
    return json.loads(json.dumps(text)).encode(errors="replace").decode()
