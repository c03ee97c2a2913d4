"""AUTOMATIC1111's API as its clients use it: ``/sdapi/v1``.

Clients send every field that they know with every call. What can be honoured is; what cannot is
taken at the value that asks for nothing, and refused at any other, never dropped.
"""

import base64
import io
import json
import re
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, HTTPException, Query, Request
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ldm.formats.png import entries, read_text
from ldm.sampling.names import SCHEDULED
from ldm.serving.api.a1111_fields import lora_words, refuse
from ldm.serving.api.native import settings_of
from ldm.serving.api.waiting import RESPONSES, client_of, finished, service_of, submitted
from ldm.serving.draw import SEEDS, Draw, Lora, Picture, content
from ldm.serving.job import Job
from ldm.serving.pictures import flat
from ldm.serving.service import Service

_PREVIEWS = 4
_MOST = 1000  # clients whose model is remembered
_MODEL = "sd_model_checkpoint"
_TITLE = re.compile(r"(.*?)(?: \[[0-9a-f]+\])?")

routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=RESPONSES)


class Txt2img(BaseModel):
    """What is honoured of a request; the other fields that clients know may be there at the value
    that asks for nothing.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str = Field("", max_length=10_000)
    negative_prompt: str = Field("", max_length=10_000)
    seed: int = Field(-1, ge=-1, lt=SEEDS)
    subseed: int = Field(-1, ge=-1, lt=SEEDS)
    subseed_strength: float = Field(0.0, ge=0, le=1)
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100)
    scheduler: Literal["Automatic", "automatic", ""] | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int = Field(50, ge=1)
    cfg_scale: float = Field(7.0, ge=0, le=1000, allow_inf_nan=False)
    width: int = Field(512, ge=1)
    height: int = Field(512, ge=1)
    override_settings: dict[str, Any] | None = None
    disable_extra_networks: bool = False
    send_images: bool = True
    save_images: bool = False


class Img2img(Txt2img):
    """The same from a picture."""

    init_images: list[Picture] = Field(min_length=1, max_length=1)
    mask: Picture | None = None
    denoising_strength: float = Field(0.75, ge=0, le=1)
    mask_blur: int = Field(4, ge=0, le=1000)
    inpainting_mask_invert: Literal[0, 1] = 0
    resize_mode: Literal[0] = 0
    inpainting_fill: Literal[0, 1] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=4096)


class PngInfo(BaseModel):
    """A picture whose parameters are read."""

    model_config = ConfigDict(strict=True)
    image: Picture


@routes.post("/txt2img")
async def txt2img(request: Request, asked: Txt2img) -> Any:
    """Draws pictures of a prompt."""
    return await _drawn(request, asked, {})


@routes.post("/img2img")
async def img2img(request: Request, asked: Img2img) -> Any:
    """Draws pictures from a picture, or what a mask shows of it. ``mask_blur`` are the pixels on
    which what is drawn fades into the rest; with ``inpaint_full_res``, which is A1111's usual, what
    is masked is drawn alone, at ``width`` and ``height``, and put back.
    """
    edit: dict[str, Any] = {"image": asked.init_images[0], "strength": asked.denoising_strength}
    if asked.mask is not None:
        if asked.inpainting_fill == 0 and asked.denoising_strength < 1:
            raise ValueError("inpainting_fill 0 below a denoising_strength of 1: send 1")
        mask = asked.mask
        if asked.inpainting_mask_invert:
            mask = await run_in_threadpool(_inverted, mask)
        edit |= {"mask": mask, "feather": asked.mask_blur}
        if asked.inpaint_full_res:
            edit["mask_crop"] = asked.inpaint_full_res_padding
    return await _drawn(request, asked, edit)


async def _drawn(request: Request, asked: Txt2img, edit: dict[str, Any]) -> Any:
    refuse(asked.model_extra or {}, image=bool(edit))
    model = _model_of(request, asked.override_settings or {})
    prompt, loras = asked.prompt, list[Lora]()
    if not asked.disable_extra_networks:
        prompt, named = lora_words(prompt)
        loras = [Lora(name=name, weight=weight) for name, weight in named]
    varied = asked.subseed_strength > 0
    other = secrets.randbelow(SEEDS) if asked.subseed == -1 else asked.subseed
    draw = Draw(
        prompt=prompt,
        negative=asked.negative_prompt,
        model=model,
        count=asked.batch_size * asked.n_iter,
        seed=None if asked.seed == -1 else asked.seed,
        width=asked.width,
        height=asked.height,
        steps=asked.steps,
        guidance=asked.cfg_scale,
        sampler=asked.sampler_name or asked.sampler_index or None,
        syntax="a1111",
        variation_seed=other if varied else None,
        variation_strength=asked.subseed_strength if varied else 0.1,
        loras=loras,
        previews=_PREVIEWS,
        **edit,
    )
    job = await finished(request, await submitted(request, draw, kept=False))
    told = asked.model_dump(exclude={"init_images", "mask"})
    return await run_in_threadpool(_answer, service_of(request), job, told, asked.send_images)


def _answer(service: Service, job: Job, told: dict[str, Any], pictures: bool) -> dict[str, Any]:
    files = [service.gallery.picture(job.pictures[n]) for n in range(job.draw.count)]
    if None in files:
        raise HTTPException(404, "the picture was removed")
    texts = [read_text(file) for file in files if file is not None]
    data = [base64.b64encode(file.read_bytes()).decode() for file in files if file is not None]
    draw, seeds = job.draw, [job.draw.seeds(n) for n in range(job.draw.count)]
    others = [-1 if other is None else other for _, other in seeds]
    info = {
        "prompt": draw.prompt,
        "all_prompts": [draw.prompt] * draw.count,
        "negative_prompt": draw.negative,
        "all_negative_prompts": [draw.negative] * draw.count,
        "seed": seeds[0][0],
        "all_seeds": [seed for seed, _ in seeds],
        "subseed": others[0],
        "all_subseeds": others,
        "subseed_strength": draw.variation_strength if draw.variation_seed is not None else 0,
        "width": draw.width,
        "height": draw.height,
        "sampler_name": _label(draw.sampler),
        "cfg_scale": draw.guidance,
        "steps": draw.steps,
        "batch_size": draw.count,
        "sd_model_name": draw.model,
        "denoising_strength": draw.strength,
        "index_of_first_image": 0,
        "infotexts": texts,
    }
    return {"images": data if pictures else [], "parameters": told, "info": json.dumps(info)}


def _inverted(mask: str) -> str:
    image = ImageOps.invert(flat(content(mask), "mask", white=False).convert("L"))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _label(name: str | None) -> str | None:
    return SCHEDULED[name].label if name in SCHEDULED else name


def _model_of(request: Request, override: dict[str, Any]) -> str | None:
    """The model that a request names, or that its client has chosen."""
    for name, value in override.items():
        if name != _MODEL and value is not None:
            raise ValueError(f"override_settings.{name}: it cannot be changed here")
    named = override.get(_MODEL)
    if named is not None:
        return _titled(request, named)
    return _chosen(request).get(client_of(request))


def _titled(request: Request, title: Any) -> str:
    """The model of a title, which may have a hash behind it; ``NoSuch`` if there is none."""
    found = _TITLE.fullmatch(title) if isinstance(title, str) else None
    name = found[1].removesuffix(".safetensors") if found else str(title)[:100]
    return service_of(request).shelf.model(name)[0]


def _chosen(request: Request) -> dict[str, str]:
    """Models that clients have chosen for themselves."""
    state = request.app.state
    if not hasattr(state, "a1111_models"):
        state.a1111_models = {}
    return state.a1111_models


@routes.get("/options")
async def options(request: Request) -> Any:
    """What a client may read of settings; the model is its own."""
    shelf = service_of(request).shelf
    name = shelf.model(_chosen(request).get(client_of(request)))[0]
    return {
        _MODEL: name,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
        "show_progress_every_n_steps": 1,
    }


@routes.post("/options")
async def set_options(request: Request, asked: Annotated[dict[str, Any], Body()]) -> Any:
    """Chooses a model for this client's requests; everything else is refused: a setting here would
    be one of all clients.
    """
    for name in asked:
        if name != _MODEL:
            raise ValueError(f"{name[:60]}: it cannot be changed here, send it with each request")
    if _MODEL in asked:
        chosen = _chosen(request)
        chosen[client_of(request)] = _titled(request, asked[_MODEL])
        while len(chosen) > _MOST:
            del chosen[next(iter(chosen))]
    return None


@routes.get("/progress")
async def progress(
    request: Request, skip_current_image: Annotated[bool, Query()] = False
) -> Any:  # fmt: skip
    """How far this client's jobs are."""
    service, client = service_of(request), client_of(request)
    own = [job for job in [*service.jobs.values()] if job.client == client]
    current = next((job for job in own if job.progress), own[0] if own else None)
    steps = {} if current is None else dict(current.progress)
    done, of = next(iter(steps.values()), (0, 0))
    whole = sum(job.draw.count for job in own)
    parts = [d / o for job in own for d, o in [*job.progress.values()]]
    ready = sum(len(job.pictures) for job in own) + sum(parts)
    seconds = None if current is None else (await run_in_threadpool(service.told, current))[
        "seconds"]  # fmt: skip
    url = None if current is None or skip_current_image else current.preview
    return {
        "progress": ready / whole if whole else 0.0,
        "eta_relative": seconds or 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "" if current is None else current.id,
            "job_count": len(own),
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": of,
        },
        "current_image": None if url is None else url.partition(",")[2],
        "textinfo": None,
    }


@routes.post("/interrupt")
async def interrupt(request: Request) -> Any:
    """Cancels this client's jobs, and nobody else's."""
    await run_in_threadpool(service_of(request).interrupt, client_of(request))
    return {}


@routes.post("/skip")
async def skip(request: Request) -> Any:
    """The same: a job is drawn as a whole or not."""
    return await interrupt(request)


@routes.get("/samplers")
async def samplers() -> Any:
    """Samplers by the names that these clients have for them."""
    return [
        {"name": known.label, "aliases": [name], "options": {}} for name, known in SCHEDULED.items()
    ]


@routes.get("/schedulers")
async def schedulers() -> Any:
    """The spacing of steps is the sampler's own."""
    return [{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0,
             "need_inner_model": False}]  # fmt: skip


@routes.get("/sd-models")
async def sd_models(request: Request) -> Any:
    """The models there are to choose."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name,
         "config": None}
        for name in service_of(request).shelf.models
    ]  # fmt: skip


@routes.get("/loras")
async def loras(request: Request) -> Any:
    """LoRAs that a prompt may name, as <lora:NAME:WEIGHT>."""
    names = await run_in_threadpool(service_of(request).shelf.loras)
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@routes.get("/embeddings")
async def embeddings() -> Any:
    """There are none."""
    return {"loaded": {}, "skipped": {}}


@routes.get("/sd-vae")
@routes.get("/hypernetworks")
@routes.get("/face-restorers")
@routes.get("/realesrgan-models")
@routes.get("/prompt-styles")
@routes.get("/latent-upscale-modes")
async def nothing() -> list[Any]:
    """There are none."""
    return []


@routes.get("/upscalers")
async def upscalers() -> Any:
    """There is none but doing nothing."""
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None,
             "scale": 4}]  # fmt: skip


@routes.get("/scripts")
async def scripts() -> Any:
    """There are none."""
    return {"txt2img": [], "img2img": []}


@routes.get("/cmd-flags")
async def cmd_flags() -> Any:
    """There are none."""
    return {}


@routes.get("/memory")
async def memory() -> Any:
    """It is not told."""
    return {"ram": {}, "cuda": {}}


@routes.post("/refresh-checkpoints")
@routes.post("/refresh-loras")
async def refresh() -> None:
    """LoRAs are looked for whenever they are asked for; models when the server starts."""


@routes.post("/png-info")
async def png_info(asked: PngInfo) -> Any:
    """The parameters that a picture carries."""
    try:
        text = (await run_in_threadpool(settings_of, content(asked.image)))["text"]
    except ValueError:
        text = ""
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters":
            entries(text)}  # fmt: skip
