"""Several models in a row: the first draws a text, each of the others enlarges what came before.

    x^0 ~ p(x^0 | text),   x^k ~ p(x^k | noised x^{k-1}, text)

(Ho et al. 2022, section 2; Saharia et al. 2022, section 2.4). The stages are ordinary pipelines and
folders, of pixels or of latents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.calls.arguments import Pictures
from ldm.calls.arguments import output_type as form_of
from ldm.pipeline import LatentDiffusionPipeline

_OF_ONE = (
    "image", "mask_image", "strength", "feather", "variation", "latents", "denoising_start",
    "denoising_end",
)  # fmt: skip
"""Arguments of a pipeline that say what one stage sets out from."""


@dataclass(frozen=True)
class CascadeOutput:
    """What a cascade has drawn.

    Args:
        images: those of the last stage, as its pipeline returns them.
        stages: those of all stages, if they were asked for.
        nsfw_content_detected: as the last stage's safety checker says, if it has one.
    """

    images: Any
    stages: list[Any] = field(default_factory=list)
    nsfw_content_detected: list[bool] | None = None


class Cascade:
    """Pipelines of which each enlarges the pictures of the one before.

    Args:
        stages: the first draws from a text, the others are told a picture too.

    Raises:
        ValueError: there are none, or one behind the first is told no picture.
    """

    def __init__(self, stages: Sequence[LatentDiffusionPipeline]) -> None:
        if not stages:
            raise ValueError("a cascade needs one stage at least")
        self.stages = list(stages)
        for number, stage in enumerate(self.stages):
            if stage.family.enlarges(stage.network) != (number > 0):
                told = "enlarges no picture" if number else "enlarges a picture, and there is none"
                raise ValueError(f"stage {number + 1} of the cascade {told}: put it elsewhere")

    @classmethod
    def from_pretrained(cls, *folders: str | os.PathLike[str], **asked: Any) -> Cascade:
        """The cascade of pipeline folders; ``asked`` are arguments of
        ``LatentDiffusionPipeline.from_pretrained``.
        """
        return cls([LatentDiffusionPipeline.from_pretrained(f, **asked) for f in folders])

    def to(self, *where: Any, **named: Any) -> Cascade:
        """Brings all stages to a device or a dtype."""
        for stage in self.stages:
            stage.to(*where, **named)
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Of all stages."""
        for stage in self.stages:
            stage.set_progress_bar_config(**settings)

    def __call__(
        self,
        prompt: str | list[str] = "",
        *,
        guidance: float | Sequence[float | None] | None = None,
        steps: int | Sequence[int | None] | None = None,
        sampler: str | Sequence[str | None] | None = None,
        noise_level: int | Sequence[int | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        output_type: str = "pil",
        intermediate: bool = False,
        **asked: Any,
    ) -> CascadeOutput:
        """Draws ``len(prompt) * num_images_per_prompt`` pictures through all stages.

        Args:
            prompt: one text or several, which every stage is told.
            guidance: scale of classifier-free guidance, of all stages or of each; None: what its
                folder states.
            steps: of the sampler, the same.
            sampler: its name, the same.
            noise_level: number of the level at which a stage is told what came before; of all, or
                of each behind the first.
            height: of the first stage's pictures, in pixels; the others are larger by as much as
                their own sizes say.
            width: the same.
            num_images_per_prompt: pictures of every prompt.
            generator: one draws the batch as stock does; of a list each draws one picture. They go
                on from stage to stage.
            seed: picture i is drawn by the generator of seed + i (or of seed[i]), in all stages.
            output_type: see ``LatentDiffusionPipeline``.
            intermediate: whether to return the pictures of all stages.
            asked: further arguments of every stage (``negative_prompt``, ``batch_size``, ...).

        Raises:
            ValueError: an argument is wrong; the message is one line.
        """
        form = form_of(output_type)
        for name in _OF_ONE:
            if asked.get(name) is not None:
                raise ValueError(
                    f"{name}: a cascade draws from noise: leave it out, or call its stages one by"
                    " one"
                )
        many, behind = len(self.stages), len(self.stages) - 1
        scales, counts, names = (
            _each(key, value, many)
            for key, value in (("guidance", guidance), ("steps", steps), ("sampler", sampler))
        )
        levels = [None, *_each("noise_level", noise_level, behind)]
        drawn_by = Pictures.asked(
            prompt, None, num_images_per_prompt, generator, _plain(seed), None
        ).generators
        size, whole, picture, found = (height, width), None, None, []
        for number, stage in enumerate(self.stages):
            told: dict[str, Any] = {} if picture is None else {"image": picture}
            if levels[number] is not None:
                told["noise_level"] = levels[number]
            if number and size != (None, None):
                size = self._enlarged(number, size)
            last = number == behind
            whole = stage(
                prompt,
                guidance_scale=scales[number],
                num_inference_steps=counts[number],
                sampler=names[number],
                height=size[0],
                width=size[1],
                num_images_per_prompt=num_images_per_prompt,
                generator=drawn_by,
                output_type=form if last else _raw(stage),
                **told,
                **asked,
            )
            if not last:
                picture = _pixels(stage, whole.images)
            if intermediate:
                shown = whole.images if last else _shown(stage, picture, form)
                found.append(shown)
        assert whole is not None
        return CascadeOutput(whole.images, found, whole.nsfw_content_detected)

    def _enlarged(
        self, number: int, size: tuple[int | None, int | None]
    ) -> tuple[int | None, int | None]:
        """``size`` of the stage before as stage ``number`` draws it."""
        mine, before = (_side(self.stages[n]) for n in (number, number - 1))
        height, width = (None if s is None else s * mine // before for s in size)
        return height, width


def _each(name: str, value: Any, many: int) -> list[Any]:
    """``value`` of each of ``many`` stages."""
    if isinstance(value, (list, tuple)):
        if len(value) != many:
            raise ValueError(f"{name}: {len(value)} values for {many} stages: give one, or each")
        return list(value)
    return [value] * many


def _plain(seed: int | Sequence[int] | None) -> int | list[int] | None:
    return seed if seed is None or isinstance(seed, int) else list(seed)


def _side(stage: LatentDiffusionPipeline) -> int:
    """Pixels along the side of a picture where nothing is asked for."""
    side = stage.family.side(stage.network)
    if side is None:
        raise ValueError("height, width: a stage states no size of its own: leave both out")
    return (side if isinstance(side, int) else side[0]) * stage.codec.factor


def _raw(stage: LatentDiffusionPipeline) -> str:
    """The form in which pixels come that nothing has cut off: latents, where these are pixels."""
    return "latent" if stage.codec.network is None else "pt"


def _pixels(stage: LatentDiffusionPipeline, images: Tensor) -> Tensor:
    """Pixels ``n 3 h w`` in about [-1, 1] of what came in that form."""
    return images if stage.codec.network is None else images * 2 - 1


def _shown(stage: LatentDiffusionPipeline, pixels: Tensor | None, form: str) -> Any:
    """``pixels`` in the form that was asked for."""
    if form == "latent" or pixels is None:
        return pixels
    return stage.image_processor.postprocess(pixels, output_type=form)
