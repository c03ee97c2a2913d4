"""Models measured by suites of captions: what is opened once, and what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.collection import spread
from ldm.data.digits import NAMES, DigitsData
from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.data.scene import Scene
from ldm.diffusion import Objective, predictor
from ldm.engine import pictures
from ldm.engine.disk import write_text
from ldm.engine.noise import saved
from ldm.engine.record import environment
from ldm.evaluation import charts, suites
from ldm.evaluation.distances import Figure
from ldm.evaluation.emoji import Emoji, recombined, retrieval, transfer
from ldm.evaluation.features import clip, clip_score, space
from ldm.evaluation.heldout import held_out_bits, held_out_loss
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.suites import Draw, Labelled, Report
from ldm.models.clip import Clip
from ldm.models.codec import codec_of
from ldm.models.conditioner import ClipConditioner
from ldm.models.denoiser import UNetDenoiser
from ldm.models.labels import LabelConditioner
from ldm.pipeline import LatentDiffusionPipeline

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
_SHOWN = 32
PROMPTS = Path("assets/prompts")
PICTURES = ("digits", "likelihood")
"""Suites that need no text, of the models of configs/papers."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Args:
        steps: of the sampler.
        guidance: scale.
        sampler: named sampler.
        seed: picture i is drawn from seed + i.
        batch: pictures at a time, which changes none of them.
    """

    steps: int
    guidance: float
    sampler: str
    seed: int
    batch: int


def draw_with(pipe: LatentDiffusionPipeline, drawing: Drawing) -> Draw:
    """Draws captions as ``drawing`` says."""

    def draw(captions: Sequence[str]) -> Tensor:
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


class Measurer:
    """One model, and what its suites share.

    Args:
        model: pipeline folder.
        spaces: of features; by default ``pixels:16`` and the model's own picture tower.
        device: None takes a GPU if there is one.
        lists: folder of lists of prompts, ``NAME.txt`` with one a line.
    """

    def __init__(
        self,
        model: Path,
        spaces: Sequence[str] | None,
        device: str | None,
        lists: Path = PROMPTS,
    ) -> None:
        self.model, self.lists = model, lists
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.judged = (model / "image_encoder" / "config.json").is_file()
        named = spaces or ["pixels:16", *([f"clip:{model}"] if self.judged else [])]
        self.spaces = [space(spec, self.device) for spec in named]
        self.pipe = LatentDiffusionPipeline.from_pretrained(model).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.codec = codec_of(self.pipe.vae)
        side = self.pipe.unet.config.sample_size * self.codec.factor
        self.transform = ImageTransform(size=side)

    @cached_property
    def emoji(self) -> Emoji:
        """Both styles at the model's size."""
        return Emoji(self.transform)

    def measure(self, suite: str, drawing: Drawing, count: int | None = None) -> Report:
        """The figures of ``suite``; ``count`` captions instead of its own number.

        Raises:
            ValueError: the model reads no captions, which the suite is made of.
        """
        if suite not in PICTURES and self.pipe.text_encoder is None:
            told = f"--suite {suite}: this model reads no text; measure it by"
            raise ValueError(f"{told} {' or '.join(PICTURES)}")
        draw, count = draw_with(self.pipe, drawing), count or _COUNT.get(suite, 0)
        if suite in ("shapes", "shapes-new"):
            asked = suites.scenes(count, held_out=suite == "shapes-new")
            report = suites.prompt_accuracy(draw, asked)
            ceiling = self._readable(tuple(asked))
            return replace(report, figures=report.figures | {"everything, ceiling": ceiling})
        if suite == "emoji":
            return retrieval(draw, self.emoji, self.spaces, count)
        if suite == "emoji-new":
            return recombined(draw, self.emoji, self.spaces, self.reconstruct, count)
        if suite == "transfer":
            return transfer(draw, self.emoji, self.spaces, self.reconstruct, count or None)
        if suite == "quality":
            chosen = spread(self.emoji.trained, count)
            texts = [self.emoji.caption(n) for n in chosen]
            truth = self.emoji.gallery[torch.tensor(self.emoji.trained)]
            return suites.quality(
                draw, texts, truth, self.spaces, self.fit if self.judged else None
            )
        if suite == "prompts":
            return suites.prompts(draw, self.prompts(), self.fit if self.judged else None)
        if suite == "loss":
            return self.loss(count)
        if suite == "digits":
            return self.digits(draw, count)
        if suite == "likelihood":
            return self.likelihood(count)
        raise ValueError(f"there is no suite {suite!r}")

    @cache  # noqa: B019  # the same in every drawing of a sweep
    def _readable(self, asked: tuple[Scene, ...]) -> Proportion:
        return suites.readable(asked, self.transform, self.reconstruct)

    @cached_property
    def _digits(self) -> tuple[Labelled, Labelled]:
        """Those trained on and those held out, at the model's size."""
        source = DigitsData()
        labels = LabelConditioner(NAMES).tokenize([e.captions[0] for e in source.examples])[:, 0]
        pixels = [to_pixels(self.transform(source.load(n))) for n in range(len(labels))]
        out = torch.tensor([example.held_out for example in source.examples])
        trained, held_out = (Labelled(torch.stack(pixels)[m], labels[m]) for m in (~out, out))
        return trained, held_out

    def _told(self, labels: Tensor) -> list[str]:
        """What the model is told of digits: a caption, the name of a class, or nothing."""
        if self.pipe.text_encoder is not None:
            return [f"a handwritten {NAMES[n]}" for n in labels]
        return [NAMES[n] if self.pipe.config.classes else "" for n in labels]

    def digits(self, draw: Draw, count: int) -> Report:
        """``count`` digits, each class as often as the others where the model knows classes."""
        asked = torch.arange(count) % len(NAMES)
        texts = self._told(asked)
        return suites.digits(draw, texts, asked if any(texts) else None, *self._digits)

    def likelihood(self, count: int) -> Report:
        """Bits per dimension of ``count`` held-out digits."""
        if self.pipe.vae is not None or self.pipe.text_encoder is not None:
            raise ValueError("--suite likelihood: it is that of a model of pixels without text")
        _, held_out = self._digits
        chosen = spread(range(len(held_out.labels)), count)
        texts = self._told(held_out.labels[chosen])
        cond = LabelConditioner(self.pipe.config.classes or ()).encode(texts)
        pixels = held_out.pictures[chosen].to(self.device)
        process, target, _ = saved(str(self.model))
        predict = predictor(UNetDenoiser(self.pipe.unet), target)
        found = held_out_bits(predict, process, pixels, cond.to(self.device))
        return Report({"bits/dim, held-out": found}, texts, None)

    def prompts(self) -> dict[str, list[str]]:
        """The lists of prompts by name."""
        files = sorted(self.lists.glob("*.txt"))
        if not files:
            raise ValueError(f"--prompts {self.lists}: there is no .txt of prompts, one a line")
        read = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in files}
        return {name: [line for line in lines if line.strip()] for name, lines in read.items()}

    @torch.no_grad()
    def loss(self, count: int) -> Report:
        """That of ``count`` held-out emoji, by noise level."""
        chosen = spread(self.emoji.held_out, count)
        texts, truth = [self.emoji.caption(n) for n in chosen], self.emoji.gallery[chosen]
        parts = [self.codec.encode(x.to(self.device)) for x in truth.split(64)]
        z = torch.cat([self.codec.sample(m, torch.zeros_like(m.mean)) for m in parts])
        conditioner = ClipConditioner(self.pipe.tokenizer, self.pipe.text_encoder)
        process, target, learned = saved(str(self.model))
        objective, denoiser = (
            Objective(target, learned_variance=learned),
            UNetDenoiser(self.pipe.unet),
        )
        found = held_out_loss(objective, process, denoiser, z.float(), conditioner.encode(texts))
        return Report(dict(found), texts, None)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pictures ``n 3 h w`` through the autoencoder."""
        parts = [
            self.codec.decode(self.codec.encode(part.to(self.device)).mean).cpu()
            for part in x.split(64)
        ]
        return torch.cat(parts).clamp(-1, 1)

    @cached_property
    def towers(self) -> Clip:
        """The model's own CLIP."""
        return clip(str(self.model)).to(self.device)

    @torch.no_grad()
    def fit(self, captions: Sequence[str], drawn: Tensor) -> Tensor:
        """CLIP score of each caption and its picture, by the model's own towers."""
        found = []
        for texts, x in zip(
            [captions[n : n + 64] for n in range(0, len(captions), 64)],
            drawn.split(64),
            strict=True,
        ):
            ids = self.pipe.tokenizer(
                list(texts), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            found.append(clip_score(self.towers, ids.to(self.device), x.to(self.device)).cpu())
        return torch.cat(found)

    def write(
        self, out: Path, reports: Mapping[str, Sequence[Report]], drawings: Sequence[Drawing],
        swept: str,
    ) -> None:  # fmt: skip
        """``figures.json`` and ``table.md`` of all suites so far."""
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "model": self.model.resolve().name,
            "environment": environment(),
            "measured": [
                {
                    "suite": suite,
                    "drawing": asdict(drawing),
                    "figures": {k: v._asdict() for k, v in report.figures.items()},
                }
                for suite, several in reports.items()
                for drawing, report in zip(drawings, several, strict=True)
            ],
        }
        write_text(out / "figures.json", json.dumps(record, indent=1))
        write_text(out / "table.md", markdown(reports, drawings, swept))

    def show(
        self, out: Path, suite: str, several: Sequence[Report], drawings: Sequence[Drawing],
        swept: str,
    ) -> None:  # fmt: skip
        """A sheet of ``suite``, and of a sweep its charts."""
        drawn = [report.drawn for report in several if report.drawn is not None]
        if drawn:
            every = range(len(drawn[0]))
            shown = list(every) if suite == "prompts" else spread(every, _SHOWN)
            cells = [[to_image(x[n]) for x in drawn] for n in shown]
            captions = [several[0].captions[n] for n in shown]
            columns = 8 if len(several) == 1 else max(1, 15 // len(several))
            page = pictures.sheet(cells, captions, columns=columns)
            pictures.save(page, out / f"{suite}.png")
        figures = [report.figures for report in several]
        if swept and any(isinstance(figure, Proportion) for figure in figures[0].values()):
            values = [getattr(drawing, swept) for drawing in drawings]
            charts.lines(swept, values, figures, out / f"{suite}-{swept}.png")
            if "clip score" in figures[0]:
                charts.trade_off(swept, values, figures, out / f"{suite}-frechet-clip.png")


def rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """Name, sample size, and the value of every drawing with its interval, of each figure."""
    return [
        (key, str(figure.n), *(_short(report.figures[key]) for report in reports))
        for key, figure in reports[0].figures.items()
    ]


def heads(drawings: Sequence[Drawing], swept: str) -> list[str]:
    """Those of ``rows``."""
    columns = [f"{swept} {getattr(d, swept)}" if swept else "measured" for d in drawings]
    return ["figure", "n", *columns]


def _short(figure: Figure | Proportion) -> str:
    if isinstance(figure, Proportion):
        value, low, high = (f"{100 * share:.1f}" for share in figure[:3])
        return f"{value} % [{low}, {high}]"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"


def markdown(
    reports: Mapping[str, Sequence[Report]], drawings: Sequence[Drawing], swept: str
) -> str:
    """One table: a line a figure, a column a drawing, 95 % intervals in brackets."""
    top = ["suite", *heads(drawings, swept)]
    lines = [" | ".join(top), "|".join("---" for _ in top)]
    lines += [
        " | ".join((suite, *row)) for suite, several in reports.items() for row in rows(several)
    ]
    return "".join(f"| {line} |\n" for line in lines)
