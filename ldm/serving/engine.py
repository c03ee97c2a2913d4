"""A model that is loaded, and how one picture is drawn with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.editing.edit import STRENGTH
from ldm.editing.masks import outpainted
from ldm.formats.png import Parameters
from ldm.guidance import ClassifierFree
from ldm.models.tokenizer import unreadable
from ldm.pipeline import LatentDiffusionPipeline
from ldm.prompts.windows import SYNTAX, count
from ldm.sampling import sampler as named_sampler
from ldm.sampling.names import NAMES
from ldm.serving.draw import Draw, content
from ldm.serving.job import Job
from ldm.serving.limits import Limits, work
from ldm.serving.network import Network
from ldm.serving.pictures import MOST, flat
from ldm.serving.preview import Preview, Watched
from ldm.serving.shelf import Adapting, Shelf


@dataclass(frozen=True)
class Made:
    """A picture and what its file says of it.

    Args:
        image: PIL.
        parameters: for web UIs.
        beside: for ``ldm sample --from``, by names of settings.
    """

    image: Image.Image
    parameters: Parameters
    beside: dict[str, Any]


class Engine:
    """A model behind its network.

    Args:
        name: on the shelf.
        path: of its folder or file.
        shelf: of LoRAs.
        device: where it computes.
        constant: whether all batches have one size.
        seen: of ``Network``.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        shelf: Shelf,
        device: str,
        *,
        constant: bool = False,
        seen: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.name = name
        pipe = LatentDiffusionPipeline.from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
        self.pipe, self._adapting = pipe, Adapting(pipe, shelf)
        self.network = Network(pipe, self._adapting, constant=constant, seen=seen)
        codec, family = pipe.codec, pipe.family
        self.unit = codec.factor * family.patch(pipe.network)
        side = family.side(pipe.network) or 64
        rows, columns = (side, side) if isinstance(side, int) else side
        self.width, self.height = columns * codec.factor, rows * codec.factor
        self._latent = family.channels(pipe.network), rows, columns
        self._preview = Preview(codec, pipe.network.device)
        self.samplers = [name for name in NAMES if self._steps(name)]
        self.network.start()
        self.exact = self._exact()

    def _steps(self, name: str) -> bool:
        """Whether the sampler ``name`` runs the model's noise process."""
        try:
            named_sampler(name, self.pipe.scheduler.config)
        except ValueError:
            return False
        return True

    def _exact(self) -> bool:
        """Whether company makes no difference, at the model's own size."""
        with self.network.alone() as pipe, torch.no_grad():
            told = pipe.conditioner.encode([(pipe.reads or [""])[0]])
            told = told.to(pipe.network.device, pipe.network.dtype)
        try:
            return self.network.exact(told, self._latent)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False  # a network that is told more than texts: nobody knows

    def load(self, name: str) -> None:
        """Reads a LoRA and checks it; ``NoSuch``, ``ValueError`` as ``Adapting.load`` has it."""
        with self.network.alone():
            self._adapting.load(name)

    def tokens(self, text: str, syntax: str | None) -> list[dict[str, int]]:
        """Of every text tower how many tokens ``text`` is, how many it reads, and in how many
        windows.
        """
        if wrong := unreadable(text):
            raise ValueError(f"prompt {wrong}")
        with self.network.alone() as pipe:
            towers = pipe.conditioner.towers.values()
            return [
                {
                    "tokens": tower.counts([text])[0],
                    "length": tower.length,
                    "windows": count(tower, [text], SYNTAX) if syntax else 1,
                }
                for tower in towers
            ]

    def size(self, draw: Draw) -> tuple[int, int]:
        """Width and height of what is drawn; ``ValueError`` if what it is given is no picture, or
        would become one of more than ``MOST`` pixels.
        """
        width, height = draw.width or self.width, draw.height or self.height
        if draw.image is None:
            return width, height
        image = flat(content(draw.image), "image")
        if draw.mask is not None:
            flat(content(draw.mask), "mask", white=False)
        left, top, right, bottom = draw.outpaint or (0, 0, 0, 0)
        own = image.width + left + right, image.height + top + bottom
        if draw.mask_crop is not None:
            if own[0] * own[1] > MOST:
                raise ValueError(f"a picture of more than {MOST:,} pixels is not made")
            return width, height
        return draw.width or own[0], draw.height or own[1]

    def how(self, draw: Draw) -> Draw:
        """``draw`` with what the model's folder states in place of what is not asked for."""
        how = self.pipe.sampling_defaults.but(
            num_inference_steps=draw.steps, guidance_scale=draw.guidance, sampler=draw.sampler
        )
        guidance = how.guidance_scale if self.pipe.reads != () else 1.0
        told = {"steps": how.num_inference_steps, "guidance": float(guidance)}
        return draw.model_copy(update=told | {"sampler": how.sampler})

    def check(self, draw: Draw, limits: Limits) -> float:
        """The work of one picture of ``draw``, of which nothing is missing.

        Raises:
            ValueError: it cannot be drawn, or is too much; the message is one line.
        """
        assert draw.steps is not None and draw.guidance is not None
        width, height = self.size(draw)
        if width * height > limits.pixels or max(width, height) > limits.side:
            raise ValueError(
                f"{width} x {height} pixels are too many: {limits.pixels:,} at most, and"
                f" {limits.side} on a side"
            )
        for name, value, most in (
            ("steps", draw.steps, limits.steps),
            ("count", draw.count, limits.count),
            ("prompt", len(draw.prompt), limits.text),
            ("negative", len(draw.negative), limits.text),
        ):
            if value > most:
                unit = " characters" if name in ("prompt", "negative") else ""
                raise ValueError(f"{name}: at most {most:,}{unit}, not {value:,}")
        for name, value in (("width", draw.width), ("height", draw.height)):
            own_size = draw.image is None or draw.mask_crop is not None
            if value is not None and value % self.unit and own_size:
                raise ValueError(f"{name} must be a multiple of {self.unit} pixels, not {value}")
        for name, text in (("prompt", draw.prompt), ("negative", draw.negative)):
            if "\0" in text or unreadable(text):
                raise ValueError(f"{name} holds what is no text")
            if text and self.pipe.reads == ():
                raise ValueError("this model reads no prompt")
        if draw.sampler not in (None, "model"):
            named_sampler(draw.sampler, self.pipe.scheduler.config)  # which says what it cannot run
        for lora in draw.loras:
            self.load(lora.name)
        own, guided = self.width * self.height, draw.guidance > 1
        return work(draw.steps, guided=guided, pixels=width * height, own=own)

    def draw(self, job: Job, number: int) -> Made:
        """Picture ``number`` of ``job``; the errors of ``Job.check`` and of the pipeline."""
        draw = job.draw
        seed, other = draw.seeds(number)
        call = self._call(draw) | {"seed": seed}
        if other is not None:
            call["variation"] = (other, draw.variation_strength)
        with self.network.drawing(draw.adapters, job.check) as pipe:
            call |= self._told(job, number, pipe)
            (image,) = pipe(draw.prompt, **call).images
            scheduler = type(pipe.scheduler).__name__
        return self._made(draw, seed, other, image, scheduler)

    def _call(self, draw: Draw) -> dict[str, Any]:
        heard = self.pipe.family.hears(self.pipe.network)
        found: dict[str, Any] = {
            "height": draw.height,
            "width": draw.width,
            "num_inference_steps": draw.steps,
            "guidance_scale": draw.guidance,
            "guidance_rescale": draw.guidance_rescale,
            "negative_prompt": None if heard and not draw.negative else draw.negative,
            "sampler": None if draw.sampler == "model" else draw.sampler,
            "prompt_syntax": draw.syntax,
        }
        if draw.image is None:
            return found
        image, mask = flat(content(draw.image), "image"), None
        if draw.mask is not None:
            mask = flat(content(draw.mask), "mask", white=False)
        if draw.outpaint is not None:
            left, top, right, bottom = draw.outpaint
            image, mask = outpainted(image, left=left, top=top, right=right, bottom=bottom)
        found |= {"image": image, "strength": draw.strength}
        if mask is None:
            return found
        masked = {"mask_image": mask, "feather": draw.feather, "padding_mask_crop": draw.mask_crop}
        return found | masked

    def _told(self, job: Job, number: int, pipe: Any) -> dict[str, Any]:
        """Arguments by which ``job`` is told of steps, and of previews if it wants some."""
        draw, latest = job.draw, list[Any]()

        def after(pipe: Any, index: int, timestep: Any, told: Any) -> None:
            done, of = index + 1, pipe.num_timesteps
            job.step(number, done, of)
            due = done * (draw.previews + 1) // of > index * (draw.previews + 1) // of
            if latest and due and done < of:
                job.shown(number, done, self._preview.url(latest[-1].x0))

        found: dict[str, Any] = {"callback_on_step_end": after}
        if not draw.previews:
            return found

        def see(prediction: Any) -> None:
            latest[:] = [prediction]

        family, network = pipe.family, pipe.network
        scale = family.guided(
            draw.guidance, {}, negative=bool(draw.negative), heard=family.hears(network)
        )
        return found | {"guidance": Watched(ClassifierFree(scale, draw.guidance_rescale), see)}

    def _made(
        self, draw: Draw, seed: int, other: int | None, image: Image.Image, scheduler: str
    ) -> Made:
        strength = None
        if draw.image is not None:
            usual = STRENGTH if draw.mask is None and draw.outpaint is None else 1.0
            strength = usual if draw.strength is None else draw.strength
        loras = [[name, weight] for name, weight in draw.adapters]
        parameters = Parameters(
            draw.prompt,
            negative=draw.negative,
            steps=draw.steps,
            sampler=scheduler if draw.sampler == "model" else draw.sampler,
            guidance=draw.guidance,
            seed=seed,
            width=image.width,
            height=image.height,
            model=self.name,
            lora=", ".join(f"{name} {weight:g}" for name, weight in draw.adapters) or None,
            rescale=draw.guidance_rescale or None,
            strength=strength,
            variation_seed=other,
            variation_strength=None if other is None else draw.variation_strength,
        )
        beside: dict[str, Any] = {
            "prompt": draw.prompt,
            "negative": draw.negative,
            "seed": seed,
            "steps": draw.steps,
            "guidance": draw.guidance,
            "guidance_rescale": draw.guidance_rescale,
            "sampler": draw.sampler,
            "syntax": draw.syntax,
            "strength": strength,
            "variation_seed": other,
            "loras": loras,
        }
        if draw.image is None:
            beside["size"] = f"{image.width}x{image.height}"
        elif draw.mask_crop is not None:
            beside["size"] = f"{draw.width or self.width}x{draw.height or self.height}"
        if draw.image is not None:
            around = ",".join(map(str, draw.outpaint)) if draw.outpaint else None
            edited = {"image": True, "mask": draw.mask is not None, "outpaint": around}
            edited |= {"feather": draw.feather, "mask_crop": draw.mask_crop}
            beside["edited"] = {k: v for k, v in edited.items() if v is not None}
        if other is not None:
            beside["variation_strength"] = draw.variation_strength
        kept = {name: value for name, value in beside.items() if value is not None}
        return Made(image, parameters, kept)
