"""What a model draws, measured while it trains: the suites of ``ldm evaluate`` as a validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data.collection import Collection, Items
from ldm.data.digits import NAMES
from ldm.engine import pictures
from ldm.engine.config import ConfigError
from ldm.engine.disk import write_text
from ldm.engine.figures import Drawing, markdown, numbers
from ldm.engine.measure import PICTURES, Measurer, Truth
from ldm.engine.networks import described
from ldm.engine.parts import Parts
from ldm.engine.schema import TrainConfig
from ldm.evaluation.emoji import FEWEST
from ldm.evaluation.features import space
from ldm.pipeline import LatentDiffusionPipeline

KEY = "validation.suites"


class Suites:
    """The suites that a run's validations measure; what they need is there before it begins.

    Args:
        config: the run, with a validation that has suites.
        parts: of the model.
        collection: what is trained on.
        device: where networks that judge are.

    Raises:
        ConfigError: something cannot be measured of this run.
    """

    def __init__(
        self, config: TrainConfig, parts: Parts, collection: Collection, device: torch.device
    ) -> None:
        assert config.validation is not None
        self.settings, self.size = config.validation, config.images.size
        asked = self.settings.suites
        with described("validation.spaces"):
            spaces = [space(spec, device) for spec in self.settings.spaces]
            for each in spaces:  # whether it sees pictures of this size
                each(torch.zeros(1, 3, self.size, self.size))
        compared = _compared(parts, collection) if "quality" in asked else None
        self.truth = Truth(spaces, self.size, compared=compared)
        _refuse_unread(asked, parts)
        with described(KEY):
            if asked.get("emoji-new", FEWEST) < FEWEST:
                raise ValueError(f"emoji-new: {asked['emoji-new']} captions, at least {FEWEST}")
            if "digits" in asked:
                _ = self.truth.digits
            if any(name.startswith("emoji") for name in asked):
                _ = self.truth.emoji
            if "transfer" in asked:
                _ = self.truth.emoji.read_style
        self.batch = config.micro_batch_size or min(config.batch_size, 64)

    def measure(
        self, pipe: LatentDiffusionPipeline, accelerator: Accelerator, table: Path
    ) -> dict[str, float]:
        """Every figure as ``numbers`` names it, on every process; the main one writes ``table``.

        Args:
            pipe: the model as it is.
            accelerator: the processes, which all draw.
            table: a Markdown file.
        """
        asked = self.settings

        def draw(captions: Sequence[str]) -> Tensor:
            drawn = pictures.drawn(
                pipe,
                captions,
                accelerator,
                seed=asked.seed,
                batch=self.batch,
                num_inference_steps=asked.steps,
                guidance_scale=asked.guidance,
                sampler=asked.sampler,
                height=self.size,
                width=self.size,
            )
            return torch.stack(drawn)

        measurer = Measurer(pipe, self.truth)
        reports = {name: measurer.measure(name, draw, n) for name, n in asked.suites.items()}
        if accelerator.is_main_process:
            drawing = Drawing(asked.steps, asked.guidance, asked.sampler, asked.seed, self.batch)
            told = {name: [report] for name, report in reports.items()}
            write_text(table, markdown(told, [drawing], ""))
        return {k: v for name, report in reports.items() for k, v in numbers(name, report).items()}


def _compared(parts: Parts, collection: Collection) -> Items:
    if collection.epoch is None or parts.stored:
        data = "a cached set, which holds none" if parts.stored else "streamed"
        raise ConfigError(f"{KEY}: quality compares with the run's pictures; its data is {data}")
    if len(collection.train) < 8:
        raise ConfigError(f"{KEY}: quality needs 8 pictures, and there are {len(collection.train)}")
    return collection.train


def _refuse_unread(asked: Iterable[str], parts: Parts) -> None:
    """``ConfigError`` for a suite whose captions the model does not read."""
    if parts.classes is None:
        return
    reads = "labels of classes" if parts.classes else "nothing"
    for name in asked:
        if name not in PICTURES:
            raise ConfigError(f"{KEY}: {name} asks by captions, and this model reads {reads}")
    if parts.classes and not set(NAMES) <= set(parts.classes):
        raise ConfigError(f"{KEY}: digits asks for {', '.join(NAMES)}, which are not its classes")
