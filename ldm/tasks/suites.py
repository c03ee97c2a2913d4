"""What a model draws, measured while it trains: the suites of ``ldm evaluate`` as a validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.config.schema import TrainConfig
from ldm.config.suites import SUITES, that_need
from ldm.data.collection import Collection
from ldm.data.items import Items
from ldm.errors import ConfigError
from ldm.evaluation import sheets
from ldm.evaluation.features import space
from ldm.evaluation.report import Drawing, markdown
from ldm.evaluation.runner import Evaluator, References
from ldm.evaluation.suites import Report
from ldm.families.model import Model
from ldm.families.networks import described
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.disk import write_text

KEY = "validation.suites"


class Suites:
    """The suites that a run's validations measure; what they need is there before it begins.

    Args:
        config: the run, with a validation that has suites.
        model: what is drawn with.
        collection: what is trained on.
        accelerator: where networks that judge are; one process of each machine makes what is kept.
        batch: pictures at a time.

    Raises:
        ConfigError: something cannot be measured of this run.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        collection: Collection,
        accelerator: Accelerator,
        batch: int,
    ) -> None:
        assert config.validation is not None
        self.settings, self.size, self.batch = config.validation, config.images.size, batch
        self.how = model.drawn_with(config.validation)
        asked = self.settings.suites
        _refuse_unread(asked, model)
        if self.size % model.codec.factor:
            told = f"images.size {self.size} is no multiple of {model.codec.factor}"
            raise ConfigError(f"{KEY}: {told}, and squares of that side are drawn")
        comparing = [name for name in asked if name in that_need("pictures")]
        compared = _compared(comparing[0], model, collection) if comparing else None
        with accelerator.local_main_process_first(), described(KEY):
            specs = self.settings.spaces if set(asked) & that_need("spaces") else ()
            self.truth = References(
                [space(spec, accelerator.device) for spec in specs],
                self.size,
                compared=compared,
                background=config.images.background,
            )
            for name, count in asked.items():
                SUITES[name].prepared(self.truth, count)

    def measure(self, pipe: LatentDiffusionPipeline, accelerator: Accelerator) -> dict[str, Report]:
        """The report of every suite, without pictures, on every process.

        Args:
            pipe: the model as it is.
            accelerator: the processes, which all draw.
        """
        asked = self.settings

        def draw(captions: Sequence[str]) -> Tensor:
            drawn = sheets.drawn(
                pipe,
                captions,
                accelerator,
                what="captions of the suites",
                seed=asked.seed,
                batch=self.batch,
                **asdict(self.how),
                height=self.size,
                width=self.size,
            )
            return torch.stack(drawn)

        measurer = Evaluator(pipe, self.truth)
        return {
            name: replace(SUITES[name].measured(measurer, draw, count), drawn=None)
            for name, count in asked.suites.items()
        }

    def write(self, reports: dict[str, Report], table: Path) -> None:
        """A Markdown file with all figures and their intervals."""
        drawing = Drawing.of(self.how, self.settings.seed, self.batch)
        told = {name: [report] for name, report in reports.items()}
        write_text(table, markdown(told, [drawing], ""))


def _compared(name: str, model: Model, collection: Collection) -> Items:
    """What is trained on, but for sources that are never drawn from; suite ``name`` needs it."""
    if collection.epoch is None or model.stored:
        data = "a cached set, which holds none" if model.stored else "streamed"
        raise ConfigError(f"{KEY}: {name} compares with the run's pictures; its data is {data}")
    items = collection.train
    drawn = np.array([source.weight != 0 for source in items.sources])
    return items.where(drawn[items.source])


def _refuse_unread(asked: Iterable[str], model: Model) -> None:
    """``ConfigError`` for a suite whose captions the model does not read."""
    if model.classes is None:
        return
    reads = "labels of classes" if model.classes else "nothing"
    for name in asked:
        if name in that_need("text"):
            raise ConfigError(f"{KEY}: {name} asks by captions, and this model reads {reads}")
        if model.classes and not set(names := SUITES[name].names()) <= set(model.classes):
            told = f"{name} asks for {', '.join(names)}, which are not its classes"
            raise ConfigError(f"{KEY}: {told}")
