"""What a run draws on its way for people to look at: prompts, and captions of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import to_image, to_pixels
from ldm.data.items import Item, evenly_spaced
from ldm.evaluation import sheets
from ldm.families.model import Model
from ldm.pipeline import LatentDiffusionPipeline


class Previews:
    """The sheet that every validation draws, from the same seeds.

    Args:
        config: the run.
        model: what is drawn with.
        collection: whose captions are drawn, half of them of held-out pictures as far as there are
            any. Of a stream only held-out ones: the others are not known ahead.
    """

    def __init__(self, config: TrainConfig, model: Model, collection: Collection) -> None:
        self.settings, factor = config.validation, model.codec.factor
        self.size = config.images.size // factor * factor  # with buckets it may be none of latents
        self._syntax = config.prompt_syntax
        self._model, self._cut = model, replace(config.images, size=self.size, buckets=None)
        asked = config.validation.captions if config.validation else 0
        held_out = evenly_spaced(collection.held_out, asked // 2)
        trained = (
            []
            if collection.epoch is None
            else evenly_spaced(collection.train, asked - len(held_out))
        )
        self._chosen = [(item, False) for item in trained] + [(item, True) for item in held_out]

    def __bool__(self) -> bool:
        return bool(self._chosen or (self.settings and self.settings.prompts))

    @property
    def key(self) -> str:
        """The key of the config that asks for them."""
        return (
            "validation.prompts"
            if self.settings and self.settings.prompts
            else "validation.captions"
        )

    def page(self, pipe: LatentDiffusionPipeline, accelerator: Accelerator) -> Image.Image:
        """What ``pipe`` draws of the prompts, and below of the captions, each beside its true
        picture as a square; all processes take part.
        """
        asked = self.settings
        assert asked is not None
        pages = []
        if asked.prompts:
            prompts = [prompt for prompt in asked.prompts for _ in range(asked.count)]
            cells = [[image] for image in self._drawn(pipe, prompts, accelerator)]
            pages.append(sheets.sheet(cells, prompts if any(prompts) else None, columns=8))
        if self._chosen:
            unconditional = self._model.classes == ()
            captions = ["" if unconditional else item.caption(None) for item, _ in self._chosen]
            drawn = self._drawn(pipe, captions, accelerator, self._told(pipe.device))
            cells = [
                [x, *self._true(item)] for x, (item, _) in zip(drawn, self._chosen, strict=True)
            ]
            told = [
                f"held out: {c}" if out else c
                for c, (_, out) in zip(captions, self._chosen, strict=True)
            ]
            pages.append(sheets.sheet(cells, told if any(captions) else None, columns=4))
        return sheets.stacked(pages)

    def _told(self, device: torch.device) -> dict[str, Tensor]:
        """What the network is told of the true pictures themselves, if anything."""
        aside = self._model.aside
        if aside is None:
            return {}
        if aside.hinted:
            seen = torch.stack([self._cut(item.hint()) for item, _ in self._chosen])
            return aside.asked({"hint": seen.to(device)})
        pixels = torch.stack([to_pixels(self._cut(item.load())) for item, _ in self._chosen])
        return aside.asked(aside.made(pixels.to(device)))

    def _drawn(
        self,
        pipe: LatentDiffusionPipeline,
        prompts: Sequence[str],
        accelerator: Accelerator,
        each: Mapping[str, Tensor] | None = None,
    ) -> list[Image.Image]:
        asked = self.settings
        assert asked is not None
        drawn = sheets.drawn(
            pipe,
            prompts,
            accelerator,
            what="the validation's previews",
            seed=asked.seed,
            prompt_syntax=self._syntax,
            batch=4,  # few, so that many processes have some
            each=each,
            **asdict(self._model.drawn_with(asked)),
            height=self.size,
            width=self.size,
        )
        return [to_image(picture) for picture in drawn]

    def _true(self, item: Item) -> list[Image.Image]:
        """The picture of ``item``; of a cached set there is none."""
        return [] if self._model.stored else [to_image(to_pixels(self._cut(item.load())))]
