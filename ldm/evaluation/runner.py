"""Models measured by suites of captions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.data.images import Colour, ImageTransform
from ldm.data.items import Items, evenly_spaced
from ldm.diffusion import NoiseProcess, Target
from ldm.evaluation import suites
from ldm.evaluation.features import Judge, Space
from ldm.evaluation.pipe import Pipe
from ldm.evaluation.reference import of_items
from ldm.evaluation.report import Drawing
from ldm.evaluation.sheets import counted
from ldm.evaluation.suites import Draw, Report, Spent
from ldm.progress import Progress

T = TypeVar("T")

PROMPTS = Path("assets/prompts")
FEWEST = 8
"""Pictures that are compared as a set, one of which is left out at a time."""


@contextmanager
def counting(pipes: Sequence[Pipe], spent: Spent, pictures: int) -> Iterator[None]:
    """Inside, ``pipes`` draw ``pictures`` one behind the other, and what it costs is added to
    ``spent``.
    """

    def passed(_: Any, inputs: tuple[Any, ...]) -> None:
        spent.evaluations += len(inputs[0])

    hooks = [pipe.network.register_forward_pre_hook(passed) for pipe in pipes]
    begin = time.perf_counter()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        spent.seconds += time.perf_counter() - begin
        spent.pictures += pictures


def draw_with(
    pipes: Sequence[Pipe],
    drawing: Drawing,
    what: str = "captions",
    spent: Spent | None = None,
    through: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Draw:
    """Draws captions as ``drawing`` says.

    Args:
        pipes: what draws, one or a row of them.
        drawing: how, the first of them.
        what: is told to people who wait.
        spent: what it costs is added to it.
        through: draws by all of them what the arguments of a call of the first ask for; None: the
            first alone does.
    """

    def draw(captions: Sequence[str]) -> Tensor:
        count = len(captions)
        with (
            counting(pipes, spent or Spent(), count),
            Progress(f"drawing {what}", "pictures", count) as progress,
            ExitStack() as stack,
        ):
            for pipe in pipes:
                stack.enter_context(counted(pipe, progress, count / len(pipes)))
            call = {
                "prompt": list(captions),
                "num_inference_steps": drawing.steps,
                "guidance_scale": drawing.guidance,
                "sampler": drawing.sampler,
                "seed": drawing.seed,
                "batch_size": drawing.batch,
                "output_type": "pt",
            }
            images = through(call) if through else pipes[0](**call).images
        return images.float().cpu() * 2 - 1

    return draw


class References:
    """True pictures and texts that models are measured by, each made once, and the spaces in which
    pictures are compared.

    Args:
        spaces: of features; the first of a CLIP judges how pictures fit their texts.
        size: side of the pictures in pixels.
        judge: where none of them is one.
        compared: what ``quality`` compares with, and whose captions it draws; None: nothing.
        background: colour under transparent pixels of those.
        lists: folder of lists of prompts, ``NAME.txt`` with one a line.

    Raises:
        ValueError: a space does not see pictures of this size, or there are too few to compare
            with.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        size: int,
        *,
        judge: Judge | None = None,
        compared: Items | None = None,
        background: Colour = (255, 255, 255),
        lists: Path = PROMPTS,
    ) -> None:
        self.spaces, self.transform = spaces, ImageTransform(size=size)
        self.judge = next((s.judge for s in spaces if s.judge), judge)
        self.compared, self.lists = compared, lists
        if compared is not None and len(compared) < FEWEST:
            raise ValueError(f"quality compares with {FEWEST} pictures at least: {len(compared)}")
        cut = ImageTransform(size=size, background=background)
        self._compared = None if compared is None else of_items(compared, cut)
        self._made: dict[Any, Any] = {}
        blank = torch.zeros(1, 3, size, size)
        for each in spaces:
            each(blank)
        if self.judge:
            self.judge([""], blank)

    def once(self, make: Callable[[ImageTransform], T]) -> T:
        """What ``make`` makes of the way a model sees pictures, made once."""
        if make not in self._made:
            self._made[make] = make(self.transform)
        return self._made[make]

    def captions(self, count: int) -> list[str]:
        """``count`` first captions, at even distances, of what ``quality`` compares with."""
        assert self.compared is not None
        return [item.caption(None) for item in evenly_spaced(self.compared, count)]

    def features(self, space: Space) -> Tensor:
        """``n d`` of what ``quality`` compares with."""
        assert self._compared is not None
        return self._compared(space)

    def prompts(self) -> dict[str, list[str]]:
        """The lists of prompts by name."""
        files = sorted(self.lists.glob("*.txt"))
        if not files:
            raise ValueError(f"--prompts {self.lists}: there is no .txt of prompts, one a line")
        read = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in files}
        return {name: [line for line in lines if line.strip()] for name, lines in read.items()}


class Evaluator:
    """One model, as suites measure it.

    Args:
        pipe: the model.
        truth: what it is measured by.
        noise: reads the process that its folder states, what it predicts, and whether it also
            predicts a variance; None where it is in no folder yet.
    """

    def __init__(
        self,
        pipe: Pipe,
        truth: References,
        noise: Callable[[], tuple[NoiseProcess, Target, bool]] | None = None,
    ) -> None:
        self.pipe, self.truth, self._noise = pipe, truth, noise
        self.codec = pipe.codec

    def noise(self) -> tuple[NoiseProcess, Target, bool]:
        """Process, target, and whether a variance is predicted."""
        assert self._noise is not None
        return self._noise()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures ``n 3 h w`` through the autoencoder."""
        parts = [
            self.codec.decode(self.codec.encode(part.to(self.pipe.device)).mean).cpu()
            for part in x.split(64)
        ]
        return torch.cat(parts).clamp(-1, 1)


def prepare_quality(truth: References, count: int) -> None:
    """Makes the features of what is compared with."""
    for space in truth.spaces:
        truth.features(space)


def quality(model: Evaluator, draw: Draw, count: int) -> Report:
    """``suites.quality`` over ``count`` captions."""
    truth = model.truth
    return suites.quality(draw, truth.captions(count), truth.features, truth.spaces, truth.judge)


def prepare_prompts(truth: References, count: int) -> None:
    """Reads the lists, so that what is wrong with them is told now."""
    truth.prompts()


def prompts(model: Evaluator, draw: Draw, count: int) -> Report:
    """``suites.prompts`` of all lists."""
    return suites.prompts(draw, model.truth.prompts(), model.truth.judge)
