"""What ``metrics.jsonl`` says, and the sample sheets, in TensorBoard or Weights & Biases as well.

The x axis is images. The file stays the truth: it is cut back where a run goes on, and an event
file or a server cannot be. TensorBoard is told to leave out what lies behind that point
(``purge_step``). A run of wandb goes on under its id, kept in ``RUN/wandb.json``, and wandb passes
over lines that it has: they hold the same numbers, as a run is a function of its config and data.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from ldm.config.loader import plain
from ldm.config.schema import RunConfig
from ldm.errors import ConfigError
from ldm.storage.disk import write_text, writing
from ldm.storage.json import JsonError, read_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

Name = Literal["tensorboard", "wandb"]
WANDB_ID = "wandb.json"


def require(names: Sequence[Name]) -> None:
    """``ConfigError`` for the first tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"trackers: {name} is not installed: pip install {name}, or leave"
                f" {name} out of trackers"
            )


def _wandb_id(file: Path) -> str:
    try:
        return read_json(file, _Wandb)["id"]
    except JsonError as error:
        told = "remove it, and the numbers go into a new run of wandb from here on"
        raise ConfigError(f"trackers: {error}: {told}") from None


class _Wandb(TypedDict):
    id: str


class Trackers:
    """The trackers of a run; only its main process writes. A context that ends with them.

    Args:
        config: the run.
        accelerator: tells the main process.
        seen: images after which the run goes on; 0 where it begins.

    Raises:
        ConfigError: a tracker is not installed or cannot be reached.
        DiskError: there is no room for them.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, seen: int) -> None:
        require(config.trackers)
        self.run = Path(config.run)
        self.open: list[GeneralTracker] = []
        if not accelerator.is_main_process:
            return
        with self._writing():
            for name in config.trackers:
                make = self._tensorboard if name == "tensorboard" else self._wandb
                self.open.append(make(config, seen))

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._writing():
            for tracker in self.open:
                tracker.finish()

    def log(self, seen: int, values: Mapping[str, Any]) -> None:
        """The numbers among ``values`` after ``seen`` images; ``OSError`` if the disk is full."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.open:
            tracker.log(numbers, step=seen)

    def show(self, file: Path, seen: int) -> None:
        """The sheet ``file`` after ``seen`` images, if there is one."""
        if not self.open or not file.is_file():
            return
        with Image.open(file) as page:
            picture = np.asarray(page.convert("RGB"))[None]
        for tracker in self.open:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture}, step=seen, **layout)

    def _writing(self):
        return writing("what the trackers keep", self.run, "the same command goes on")

    def _tensorboard(self, _: RunConfig, seen: int) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker("tensorboard", self.run, purge_step=seen + 1)
        tracker.start()
        return tracker

    def _wandb(self, config: RunConfig, seen: int) -> GeneralTracker:
        import wandb
        from accelerate.tracking import WandBTracker

        self.run.mkdir(parents=True, exist_ok=True)
        file = self.run / WANDB_ID
        if seen == 0 or not file.is_file():  # one that begins anew is another run
            write_text(file, json.dumps({"id": uuid.uuid4().hex}))
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "ldm"),
            id=_wandb_id(file),
            name=self.run.resolve().name,
            resume="allow",
            dir=self.run,
            config=plain(config),
            settings=wandb.Settings(console="off"),  # the terminal belongs to the progress bar
        )
        try:
            tracker.start()
        except wandb.Error as error:
            line = " ".join(str(error).split())
            raise ConfigError(
                f"trackers: wandb cannot start: {line}; with WANDB_MODE=offline it writes into"
                f" {self.run}, for wandb sync later"
            ) from None
        return tracker
