"""What a training program hands to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from ldm.data.items import Item
from ldm.engine.ema import Averages
from ldm.engine.sampler_state import Memory


class Task(Protocol):
    """What a program trains: a module that turns a micro-batch into losses, and its folder
    format.
    """

    memory: Memory
    """What is learnt from every step beside the weights."""

    average: Averages | None
    """The moving averages of the weights, handed over by the trainer, if it keeps some."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """What was read from folders, by keys of a run's identity: it is a function of these too.
        Of weights a fingerprint.
        """
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by stable names."""
        ...

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample tensors of shape ``b``; ``loss`` is what is minimised, the others are
        logged.
        """
        ...

    def example(self, n: int) -> dict[str, Tensor]:
        """A micro-batch of ``n`` images without values, on the current device: what is computed of
        it costs what a step does (``ldm.tasks.estimate``).
        """
        ...

    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Measures on held-out data with the weights as they are; pictures go into ``folder``,
        if it is given.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights as they are, with everything needed to use them, into ``folder``."""
        ...

    def snapshot(self) -> Callable[[Path], None] | None:
        """What writes the same at any later time, from another thread, while the weights learn on:
        it holds copies of them in the host's memory. None: there is only ``save``.
        """
        ...

    def finish(self, folder: Path) -> None:
        """Writes what the run is for into ``folder``, at its end: ``save``, or more."""
        ...

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """The trained parameters of a folder that ``save`` wrote."""
        ...


class Draws(Protocol):
    """The images of a run, in order, by position: how many came before."""

    @property
    def one_reader(self) -> bool:
        """Whether a second process would read no faster: no picture is decoded, or a stream is."""
        ...

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The image with all its draws; ``position``, and where there are any the time ``u``."""
        ...

    def item(self, position: int) -> Item:
        """What the image is made from."""
        ...


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to training mode."""
    module.eval()
    try:
        yield
    finally:
        module.train()
