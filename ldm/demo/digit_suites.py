"""What a model of pixels draws of ``digits``, and how probable held-out ones are to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.data.images import ImageTransform, to_pixels
from ldm.data.items import evenly_spaced
from ldm.demo.digits import NAMES, DigitsData
from ldm.diffusion import predictor
from ldm.evaluation.heldout import held_out_bits
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.runner import Evaluator, References
from ldm.evaluation.suites import Draw, Report, nearness
from ldm.models.labels import LabelConditioner


def prepare(truth: References, count: int) -> None:
    """Makes the true digits."""
    truth.once(true_digits)


def drawn(model: Evaluator, draw: Draw, count: int) -> Report:
    """``digits`` of ``count``, each class as often as the others where the model knows classes."""
    asked = torch.arange(count) % len(NAMES)
    texts = _told(model, asked)
    true = model.truth.once(true_digits)
    return digits(draw, texts, asked if any(texts) else None, *true)


def likelihood(model: Evaluator, draw: Draw, count: int) -> Report:
    """Bits per dimension of ``count`` held-out digits, to a model of pixels; nothing is drawn."""
    if model.codec.network is not None or model.pipe.reads is None:
        raise ValueError("--suite likelihood: it is that of a model of pixels without text")
    _, held_out = model.truth.once(true_digits)
    chosen = evenly_spaced(range(len(held_out.labels)), count)
    texts = _told(model, held_out.labels[chosen])
    cond = model.pipe.conditioner.encode(texts)
    pixels = held_out.pictures[chosen].to(model.pipe.device)
    process, target, _ = model.noise()
    predict = predictor(model.pipe.denoiser, target)
    found = held_out_bits(predict, process, pixels, cond.to(model.pipe.device))
    return Report({"bits/dim, held-out": found}, texts, None)


def _told(model: Evaluator, labels: Tensor) -> list[str]:
    """What the model is told of digits: a caption, the name of a class, or nothing."""
    if model.pipe.reads is None:
        return [f"a handwritten {NAMES[n]}" for n in labels]
    return [NAMES[n] if model.pipe.reads else "" for n in labels]


def true_digits(transform: ImageTransform) -> tuple[Labelled, Labelled]:
    """Those trained on and those held out."""
    source = DigitsData()
    labels = LabelConditioner(NAMES).tokenize([e.captions[0] for e in source.examples])[:, 0]
    pixels = [to_pixels(transform(source.load(n))) for n in range(len(labels))]
    out = torch.tensor([example.held_out for example in source.examples])
    trained, held_out = (Labelled(torch.stack(pixels)[m], labels[m]) for m in (~out, out))
    return trained, held_out


@dataclass(frozen=True)
class Labelled:
    """Pictures ``n 3 h w`` in [-1, 1] with the numbers of their classes, int64 ``n``."""

    pictures: Tensor
    labels: Tensor


def digits(
    draw: Draw, texts: Sequence[str], asked: Tensor | None, trained: Labelled, held_out: Labelled
) -> Report:
    """How near drawn digits lie to those of training, in their own 8 x 8 pixels; ``held-out`` is
    the same of as many true ones as are held out.

    Args:
        draw: the artist.
        texts: for each picture what the model is told.
        asked: the digits they ask for, ``n``; None where nothing is asked. ``class`` is the share
            whose nearest training digit is the one asked for.
        trained: the training pictures.
        held_out: true ones that were not trained on.
    """
    drawn = draw(texts)
    truth, real, seen = (
        adaptive_avg_pool2d(x.mean(1, keepdim=True), 8).flatten(1)
        for x in (trained.pictures, held_out.pictures, drawn)
    )

    def named(x: Tensor, labels: Tensor) -> Proportion:
        nearest = trained.labels[torch.cdist(x.double(), truth.double()).argmin(1)]
        return Proportion.of(int((nearest == labels).sum()), len(labels))

    figures = nearness(seen, truth)
    if asked is not None:
        figures["class"] = named(seen, asked)
    figures |= {f"{key}, held-out": figure for key, figure in nearness(real, truth).items()}
    figures["class, held-out"] = named(real, held_out.labels)
    return Report(figures, list(texts), drawn)
