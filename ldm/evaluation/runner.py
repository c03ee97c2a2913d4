"""Models measured by suites of captions."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.images import Colour, ImageTransform, to_pixels
from ldm.data.items import Items, evenly_spaced
from ldm.demo.digits import NAMES, DigitsData
from ldm.demo.scene import Scene
from ldm.diffusion import Objective, predictor
from ldm.evaluation import suites
from ldm.evaluation.emoji import Emoji, recombined, retrieval, transfer
from ldm.evaluation.features import Judge, Space
from ldm.evaluation.heldout import held_out_bits, held_out_loss
from ldm.evaluation.reference import of_items
from ldm.evaluation.report import Drawing
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import counted
from ldm.evaluation.suites import Draw, Labelled, Report
from ldm.families import FamilyDenoiser
from ldm.families.noise import saved
from ldm.models.labels import LabelConditioner
from ldm.pipeline import LatentDiffusionPipeline
from ldm.progress import Progress

_COUNT = {
    "shapes": 1000,
    "shapes-new": 1000,
    "emoji": 500,
    "emoji-new": 200,
    "quality": 2000,
    "loss": 256,
    "digits": 500,
    "likelihood": 64,
}
PROMPTS = Path("assets/prompts")
PICTURES = ("digits", "likelihood")
"""Suites that need no text, of the models of configs/papers."""
WITHOUT_SPACES = {"shapes", "shapes-new", "loss", *PICTURES}
"""Suites that compare in no space of features."""
FEWEST = 8
"""Pictures that are compared as a set, one of which is left out at a time."""


def draw_with(pipe: LatentDiffusionPipeline, drawing: Drawing, what: str = "captions") -> Draw:
    """Draws captions as ``drawing`` says; ``what`` is told to people who wait."""

    def draw(captions: Sequence[str]) -> Tensor:
        with (
            Progress(f"drawing {what}", "pictures", len(captions)) as progress,
            counted(pipe, progress, len(captions)),
        ):
            images = pipe(
                list(captions),
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                sampler=drawing.sampler,
                seed=drawing.seed,
                batch_size=drawing.batch,
                output_type="pt",
            ).images
        return images.float().cpu() * 2 - 1

    return draw


class References:
    """True pictures and texts that models are measured by, each made once, and the spaces in which
    pictures are compared.

    Args:
        spaces: of features; the first of a CLIP judges how pictures fit their texts.
        size: side of the pictures in pixels.
        judge: where none of them is one.
        compared: what ``quality`` compares with, and whose captions it draws; None: the emoji that
            the shipped model is trained on.
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
        self._readable: dict[tuple[Scene, ...], Proportion] = {}
        blank = torch.zeros(1, 3, size, size)
        for each in spaces:
            each(blank)
        if self.judge:
            self.judge([""], blank)

    @cached_property
    def emoji(self) -> Emoji:
        """Both styles."""
        return Emoji(self.transform)

    @cached_property
    def digits(self) -> tuple[Labelled, Labelled]:
        """Those trained on and those held out."""
        source = DigitsData()
        labels = LabelConditioner(NAMES).tokenize([e.captions[0] for e in source.examples])[:, 0]
        pixels = [to_pixels(self.transform(source.load(n))) for n in range(len(labels))]
        out = torch.tensor([example.held_out for example in source.examples])
        trained, held_out = (Labelled(torch.stack(pixels)[m], labels[m]) for m in (~out, out))
        return trained, held_out

    def captions(self, count: int) -> list[str]:
        """``count`` first captions, at even distances, of what ``quality`` compares with."""
        if self.compared is not None:
            return [item.caption(None) for item in evenly_spaced(self.compared, count)]
        return [self.emoji.caption(n) for n in evenly_spaced(self.emoji.trained, count)]

    def features(self, space: Space) -> Tensor:
        """``n d`` of what ``quality`` compares with."""
        if self._compared is not None:
            return self._compared(space)
        return self.emoji.features(space)[self.emoji.trained]

    def prepare(self, asked: Container[str]) -> None:
        """Makes what the suites ``asked`` need, so that what is wrong with it is told now."""
        if "digits" in asked:
            _ = self.digits
        if "quality" in asked:
            for space in self.spaces:
                self.features(space)
        if any(name in asked for name in ("emoji", "emoji-new", "transfer")):
            for space in self.spaces:
                self.emoji.features(space)
        if "transfer" in asked:
            _ = self.emoji.read_style

    def readable(
        self, asked: Sequence[Scene], reconstruct: Callable[[Tensor], Tensor]
    ) -> Proportion:
        """Ceiling of ``asked`` behind an autoencoder, of which there is one for each truth."""
        scenes = tuple(asked)
        if scenes not in self._readable:
            self._readable[scenes] = suites.readable(asked, self.transform, reconstruct)
        return self._readable[scenes]

    def prompts(self) -> dict[str, list[str]]:
        """The lists of prompts by name."""
        files = sorted(self.lists.glob("*.txt"))
        if not files:
            raise ValueError(f"--prompts {self.lists}: there is no .txt of prompts, one a line")
        read = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in files}
        return {name: [line for line in lines if line.strip()] for name, lines in read.items()}


class Evaluator:
    """One model.

    Args:
        pipe: the model.
        truth: what it is measured by.
        folder: of the model, for ``loss`` and ``likelihood``.
    """

    def __init__(
        self, pipe: LatentDiffusionPipeline, truth: References, folder: Path | None = None
    ) -> None:
        self.pipe, self.truth, self.folder = pipe, truth, folder
        self.codec = pipe.codec

    def measure(self, suite: str, draw: Draw, count: int | None = None) -> Report:
        """The figures of ``suite``; ``count`` captions instead of its own number.

        Raises:
            ValueError: the model reads no captions, which the suite is made of.
        """
        if suite not in PICTURES and self.pipe.reads is not None:
            told = f"--suite {suite}: this model reads no text; measure it by"
            raise ValueError(f"{told} {' or '.join(PICTURES)}")
        truth, count = self.truth, count or _COUNT.get(suite, 0)
        if suite in ("shapes", "shapes-new"):
            asked = suites.scenes(count, held_out=suite == "shapes-new")
            report = suites.prompt_accuracy(draw, asked)
            ceiling = truth.readable(asked, self.reconstruct)
            return replace(report, figures=report.figures | {"everything, ceiling": ceiling})
        if suite == "emoji":
            return retrieval(draw, truth.emoji, truth.spaces, count)
        if suite == "emoji-new":
            return recombined(draw, truth.emoji, truth.spaces, self.reconstruct, count)
        if suite == "transfer":
            return transfer(draw, truth.emoji, truth.spaces, self.reconstruct, count or None)
        if suite == "quality":
            texts = truth.captions(count)
            return suites.quality(draw, texts, truth.features, truth.spaces, truth.judge)
        if suite == "prompts":
            return suites.prompts(draw, truth.prompts(), truth.judge)
        if suite == "loss":
            return self.loss(count)
        if suite == "digits":
            return self.digits(draw, count)
        if suite == "likelihood":
            return self.likelihood(count)
        raise ValueError(f"there is no suite {suite!r}")

    def _told(self, labels: Tensor) -> list[str]:
        """What the model is told of digits: a caption, the name of a class, or nothing."""
        if self.pipe.reads is None:
            return [f"a handwritten {NAMES[n]}" for n in labels]
        return [NAMES[n] if self.pipe.reads else "" for n in labels]

    def digits(self, draw: Draw, count: int) -> Report:
        """``count`` digits, each class as often as the others where the model knows classes."""
        asked = torch.arange(count) % len(NAMES)
        texts = self._told(asked)
        return suites.digits(draw, texts, asked if any(texts) else None, *self.truth.digits)

    def likelihood(self, count: int) -> Report:
        """Bits per dimension of ``count`` held-out digits."""
        if self.codec.network is not None or self.pipe.reads is None:
            raise ValueError("--suite likelihood: it is that of a model of pixels without text")
        _, held_out = self.truth.digits
        chosen = evenly_spaced(range(len(held_out.labels)), count)
        texts = self._told(held_out.labels[chosen])
        cond = self.pipe.conditioner.encode(texts)
        pixels = held_out.pictures[chosen].to(self.pipe.device)
        process, target, _ = saved(str(self.folder))
        predict = predictor(self._denoiser(), target)
        found = held_out_bits(predict, process, pixels, cond.to(self.pipe.device))
        return Report({"bits/dim, held-out": found}, texts, None)

    @torch.no_grad()
    def loss(self, count: int) -> Report:
        """That of ``count`` held-out emoji, by noise level."""
        emoji = self.truth.emoji
        chosen = evenly_spaced(emoji.held_out, count)
        texts, truth = [emoji.caption(n) for n in chosen], emoji.gallery[chosen]
        parts = [self.codec.encode(x.to(self.pipe.device)) for x in truth.split(64)]
        z = torch.cat([self.codec.sample(m, torch.zeros_like(m.mean)) for m in parts])
        process, target, learned = saved(str(self.folder))
        objective = Objective(target, learned_variance=learned)
        denoiser, cond = self._denoiser(), self.pipe.conditioner.encode(texts)
        found = held_out_loss(objective, process, denoiser, z.float(), cond)
        return Report(dict(found), texts, None)

    def _denoiser(self) -> FamilyDenoiser:
        return FamilyDenoiser(self.pipe.family, self.pipe.network)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures ``n 3 h w`` through the autoencoder."""
        parts = [
            self.codec.decode(self.codec.encode(part.to(self.pipe.device)).mean).cpu()
            for part in x.split(64)
        ]
        return torch.cat(parts).clamp(-1, 1)
