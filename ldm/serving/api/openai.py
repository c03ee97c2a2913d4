"""OpenAI's images API, for its clients as they are: generations, edits, variations, models.

Names beyond theirs are those of vLLM-Omni, which their Python client sends as ``extra_body``:
``negative_prompt``, ``num_inference_steps``, ``guidance_scale``, ``seed``; and ``strength``.
"""

import base64
import io
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ldm.serving.api.waiting import (
    RESPONSES,
    STREAM,
    ended_otherwise,
    event,
    events,
    finished,
    service_of,
    submitted,
)
from ldm.serving.draw import SEEDS, Draw
from ldm.serving.job import Job, State
from ldm.serving.pictures import opened
from ldm.serving.service import Service

_Size = Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")]
_Count = Annotated[int, Field(ge=1, le=10)]
_Steps = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
_Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
_Strength = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=10_000)]
_Name = Annotated[str, Field(max_length=200)]
_B64 = "b64_json"
_NO_URL = "response_format: pictures are sent as b64_json; a url is not served"

routes = APIRouter(
    prefix="/v1",
    tags=["openai"],
    responses={**{k: v for k, v in RESPONSES.items() if k != 422}, 409: RESPONSES[503]},
)


class Generation(BaseModel):
    """Pictures of a prompt; what cannot be honoured has one value that may be sent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: _Text
    model: _Name | None = None
    n: _Count | None = 1
    size: _Size | None = "auto"
    response_format: Literal["b64_json", "url"] | None = _B64
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    output_format: Literal["png"] | None = "png"
    output_compression: Literal[100] | None = None
    quality: Literal["auto", "standard"] | None = "auto"
    background: Literal["auto", "opaque"] | None = "auto"
    moderation: Literal["auto", "low"] | None = "auto"
    style: None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    negative_prompt: _Text | None = None
    num_inference_steps: _Steps | None = None
    guidance_scale: _Scale | None = None
    seed: _Seed | None = None


def error(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    told = {"message": message, "type": kind, "param": None, "code": None}
    return {"error": told}


@routes.get("/models")
async def models(request: Request) -> Any:
    """The models there are to name."""
    return {"object": "list", "data": [_model(n) for n in service_of(request).shelf.models]}


@routes.get("/models/{name}")
async def model(request: Request, name: str) -> Any:
    """One model."""
    return _model(service_of(request).shelf.model(name)[0])


@routes.post("/images/generations", responses=STREAM)
async def generations(request: Request, asked: Generation) -> Any:
    """Draws pictures of a prompt; with ``stream`` and ``partial_images`` the way there is sent."""
    if asked.response_format == "url":
        raise HTTPException(400, _NO_URL)
    draw = Draw(
        prompt=asked.prompt,
        previews=(asked.partial_images or 0) if asked.stream else 0,
        **_common(
            asked.model, asked.n, asked.size, asked.negative_prompt, asked.num_inference_steps,
            asked.guidance_scale, asked.seed,
        ),
    )  # fmt: skip
    job = await submitted(request, draw, kept=False)
    if asked.stream:
        return _streamed(service_of(request), job, "image_generation")
    return await _answered(request, job)


@routes.post("/images/edits")
async def edits(
    request: Request,
    image: Annotated[UploadFile, File()],
    prompt: Annotated[_Text, Form()],
    mask: Annotated[UploadFile | None, File()] = None,
    model: Annotated[_Name | None, Form()] = None,
    n: Annotated[_Count, Form()] = 1,
    size: Annotated[_Size, Form()] = "auto",
    response_format: Annotated[Literal["b64_json", "url"], Form()] = "b64_json",
    output_format: Annotated[Literal["png"], Form()] = "png",
    quality: Annotated[Literal["auto", "standard"], Form()] = "auto",
    background: Annotated[Literal["auto", "opaque"], Form()] = "auto",
    user: Annotated[str | None, Form(max_length=200)] = None,
    negative_prompt: Annotated[_Text | None, Form()] = None,
    num_inference_steps: Annotated[_Steps | None, Form()] = None,
    guidance_scale: Annotated[_Scale | None, Form()] = None,
    seed: Annotated[_Seed | None, Form()] = None,
    strength: Annotated[_Strength | None, Form()] = None,
) -> Any:
    """Draws what is transparent in ``mask``, or where there is none in ``image``, and keeps the
    rest to the byte; where nothing is transparent the whole picture is drawn anew from itself.
    """
    await _known_fields(request, edits)
    if response_format == "url":
        raise HTTPException(400, _NO_URL)
    own = await image.read()
    over = None if mask is None else await mask.read()
    picture, drawn = await run_in_threadpool(_masked, own, over)
    draw = Draw(
        prompt=prompt,
        image=picture,
        mask=drawn,
        strength=strength,
        **_common(
            model, n, size, negative_prompt, num_inference_steps, guidance_scale, seed
        ),
    )  # fmt: skip
    return await _answered(request, await submitted(request, draw, kept=False))


@routes.post("/images/variations")
async def variations(
    request: Request,
    image: Annotated[UploadFile, File()],
    model: Annotated[_Name | None, Form()] = None,
    n: Annotated[_Count, Form()] = 1,
    size: Annotated[_Size, Form()] = "auto",
    response_format: Annotated[Literal["b64_json", "url"], Form()] = "b64_json",
    user: Annotated[str | None, Form(max_length=200)] = None,
    prompt: Annotated[_Text, Form()] = "",
    num_inference_steps: Annotated[_Steps | None, Form()] = None,
    guidance_scale: Annotated[_Scale | None, Form()] = None,
    seed: Annotated[_Seed | None, Form()] = None,
    strength: Annotated[_Strength | None, Form()] = None,
) -> Any:
    """Draws pictures that set out from ``image``."""
    await _known_fields(request, variations)
    if response_format == "url":
        raise HTTPException(400, _NO_URL)
    draw = Draw(
        prompt=prompt,
        image=base64.b64encode(await image.read()).decode(),
        strength=strength,
        **_common(model, n, size, None, num_inference_steps, guidance_scale, seed),
    )
    return await _answered(request, await submitted(request, draw, kept=False))


def _common(
    model: str | None,
    n: int | None,
    size: str | None,
    negative: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": model, "count": n or 1, "negative": negative or "", "steps": steps,
        "guidance": guidance, "seed": seed,
    }  # fmt: skip
    if size and (sides := re.fullmatch(r"(\d+)x(\d+)", size)):
        found |= {"width": int(sides[1]), "height": int(sides[2])}
    return found


async def _known_fields(request: Request, route: Any) -> None:
    """Refuses a form with fields that nothing reads, files of the same name twice among them."""
    form = await request.form()
    known = set(route.__annotations__) - {"request", "return"}
    if unknown := sorted(set(form) - known):
        raise HTTPException(400, f"{unknown[0]}: there is no such field here")
    for name in set(form):
        if len(form.getlist(name)) > 1:
            raise HTTPException(400, f"{name}: one is read, and there are several")


def _masked(image: bytes, mask: bytes | None) -> tuple[str, str | None]:
    """The picture and what of it is drawn, in base64; ``ValueError`` if they say nothing."""
    picture = opened(image, "image")
    over = picture if mask is None else opened(mask, "mask")
    if not over.has_transparency_data:
        if mask is not None:
            raise ValueError("mask: nothing of it is transparent: what is to be drawn has to be")
        return base64.b64encode(image).decode(), None
    if over.size != picture.size:
        raise ValueError(f"mask: it is {over.width} x {over.height} pixels, and image is not")
    alpha = over.convert("RGBA").getchannel("A")
    drawn = alpha.point(lambda value: 255 if value < 128 else 0)
    return _png(picture.convert("RGBA").convert("RGB")), _png(drawn)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def _answered(request: Request, job: Job) -> dict[str, Any]:
    await finished(request, job)
    return await run_in_threadpool(_pictures, service_of(request), job)


def _pictures(service: Service, job: Job) -> dict[str, Any]:
    data, size = [], ""
    for number in range(job.draw.count):
        content, size = _read(service, job, number)
        data.append({_B64: content, "revised_prompt": None, "seed": job.draw.seeds(number)[0]})
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": size}


def _read(service: Service, job: Job, number: int) -> tuple[str, str]:
    """A picture in base64, and its size."""
    file = service.gallery.picture(job.pictures[number])
    if file is None:
        raise HTTPException(404, "the picture was removed")
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        return base64.b64encode(content).decode(), f"{image.width}x{image.height}"


def _streamed(service: Service, job: Job, kind: str) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        shown: dict[int, int] = {}
        common = {"output_format": "png", "background": "opaque", "quality": "auto"}
        async for name, data in events(service, job):
            number, created = data.get("picture", 0), int(time.time())
            if name == "preview":
                index = shown[number] = shown.get(number, -1) + 1
                told = {_B64: data["image"].partition(",")[2], "partial_image_index": index}
                told |= {"type": f"{kind}.partial_image", "created_at": created, "size": "auto"}
                yield event(f"{kind}.partial_image", told | common)
            elif name == "picture":
                content, size = await run_in_threadpool(_read, service, job, number)
                told = {_B64: content, "created_at": created, "size": size, "seed": data["seed"]}
                told |= {"type": f"{kind}.completed", "usage": None}
                yield event(f"{kind}.completed", told | common)
            elif name == "done" and job.state is not State.DONE:
                otherwise = ended_otherwise(job)
                told = error(otherwise.status_code, str(otherwise.detail))
                yield event("error", told | {"type": "error"})

    return StreamingResponse(lines(), media_type="text/event-stream")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ldm"}
