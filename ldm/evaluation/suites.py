"""What a model draws for fixed captions, measured.

    suite(draw, ...) -> Report:   captions -> pictures -> figures with 95 % intervals

Every suite has captions of its own, the same for every model, and tells its ceiling and its floor
where those are not plain. Nothing in a suite was trained on what it measures, but a space of
features may have been (``ldm.evaluation.features``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.demo.checker import Verdict, compare, read
from ldm.demo.scene import Scene, captions, render
from ldm.demo.shapes import ShapesData
from ldm.evaluation.distances import (
    Figure,
    Moments,
    bootstrap,
    frechet,
    frechet_limit,
    jackknife,
    kid,
    mean,
    precision_recall,
)
from ldm.evaluation.features import Judge, Space
from ldm.evaluation.retrieval import Proportion

Draw = Callable[[Sequence[str]], Tensor]
"""Captions to pictures ``n 3 h w`` in [-1, 1], picture n from the n-th seed."""


@dataclass
class Report:
    """Figures by name, and what was drawn.

    Args:
        figures: with their intervals and sample sizes.
        captions: of the pictures.
        drawn: ``n 3 h w`` in [-1, 1]; None where nothing is.
    """

    figures: dict[str, Figure | Proportion]
    captions: list[str]
    drawn: Tensor | None


def scenes(count: int, *, held_out: bool, seed: int = 1) -> list[Scene]:
    """``count`` scenes of ``shapes`` with a held-out (colour, shape) pair, or without any; the
    seed is not one that models are trained on by default.
    """
    source = ShapesData(count=max(1000, 60 * count), seed=seed)
    found = []
    for index in range(source.count):
        scene = source.spec(index)
        if scene.held_out == held_out:
            found.append(scene)
        if len(found) == count:
            break
    return found


def prompt_accuracy(draw: Draw, asked: Sequence[Scene]) -> Report:
    """What of ``asked`` the pictures show, read by an exact checker (``ldm.demo.checker``).

    ``attributes`` is the share of colours, shapes and sizes that are right, over all things; its
    interval treats pictures, not things, as the trials. ``binding`` and ``relation`` are over the
    scenes of two things, ``count`` over those of several alike, ``position`` over those of one.
    """
    texts = [captions(scene)[0] for scene in asked]
    drawn = draw(texts)
    verdicts = [compare(read(to_image(x)), scene) for x, scene in zip(drawn, asked, strict=True)]
    parts = torch.tensor(
        [[v.colours, v.shapes, v.sizes, v.things] for v in verdicts], dtype=torch.float64
    )

    def share(*columns: int) -> Proportion:
        def of(x: Tensor) -> float:
            return float(x[:, list(columns)].sum() / (x[:, 3].sum() * len(columns)))

        return Proportion(*bootstrap(parts, of))

    def of(chosen: Sequence[Verdict], right: Callable[[Verdict], bool]) -> Proportion:
        return Proportion.of(sum(map(right, chosen)), len(chosen))

    two = [v for v, scene in zip(verdicts, asked, strict=True) if scene.relation]
    one = [v for v, scene in zip(verdicts, asked, strict=True) if scene.position]
    many = [v for v, s in zip(verdicts, asked, strict=True) if not (s.relation or s.position)]
    figures: dict[str, Figure | Proportion] = {
        "attributes": share(0, 1, 2),
        "colour": share(0),
        "shape": share(1),
        "size": share(2),
        "background": of(verdicts, lambda v: v.background),
    }
    if two:
        figures["binding (two things)"] = of(two, lambda v: v.binding)
        figures["relation"] = of(two, lambda v: bool(v.relation))
    if many:
        figures["count (alike)"] = of(many, lambda v: v.count)
    if one:
        figures["position"] = of(one, lambda v: bool(v.position))
    figures["everything"] = of(verdicts, lambda v: v.whole)
    return Report(figures, texts, drawn)


def readable(
    asked: Sequence[Scene], transform: ImageTransform, reconstruct: Callable[[Tensor], Tensor]
) -> Proportion:
    """Share of the true pictures of ``asked`` of which everything is read right behind the
    autoencoder, as ``transform`` shows them to it: the ceiling of ``prompt_accuracy``.
    """
    drawn = (render(scene, transform.size) for scene in asked)
    true = torch.stack([to_pixels(transform(picture)) for picture in drawn])
    seen = [read(to_image(x)) for x in reconstruct(true)]
    hits = sum(compare(s, scene).whole for s, scene in zip(seen, asked, strict=True))
    return Proportion.of(hits, len(asked))


def prompts(
    draw: Draw,
    lists: Mapping[str, Sequence[str]],
    judge: Judge | None = None,
) -> Report:
    """Pictures of ``lists`` of prompts, for people to look at; with ``judge`` the mean CLIP score
    of each.
    """
    texts = [text for several in lists.values() for text in several]
    drawn, figures, start = draw(texts), {}, 0
    for name, several in lists.items():
        if judge is not None:
            mine = drawn[start : start + len(several)]
            figures[f"clip score, {name}"] = mean(judge(several, mine))
        start += len(several)
    return Report(figures, texts, drawn)


def quality(
    draw: Draw,
    texts: Sequence[str],
    truth: Callable[[Space], Tensor],
    spaces: Sequence[Space],
    judge: Judge | None = None,
) -> Report:
    """How near what is drawn for ``texts`` lies to true pictures, of which ``truth`` knows the
    features ``m d``, as sets.

    ``frechet`` is biased upwards at a finite number of pictures, which stands beside it;
    ``frechet limit`` and ``kid`` are not. ``clip score`` is the mean of what ``judge`` gives.
    """
    true = [truth(space) for space in spaces]  # what is wrong with them is told before the drawing
    drawn = draw(texts)
    figures: dict[str, Figure | Proportion] = {}
    if judge is not None:
        figures["clip score"] = mean(judge(texts, drawn))
    for space, known in zip(spaces, true, strict=True):
        found = nearness(space(drawn), known)
        figures |= {f"{key}, {space.name}": figure for key, figure in found.items()}
    return Report(figures, list(texts), drawn)


def nearness(x: Tensor, y: Tensor) -> dict[str, Figure | Proportion]:
    """Of drawn features ``n d`` to true ones ``m d``: Frechet distance, its limit, KID, precision
    and recall.
    """
    moments, found = Moments.of(y), precision_recall(x, y)
    return {
        "frechet": jackknife(x, lambda v: frechet(v, moments)),
        "frechet limit": jackknife(x, lambda v: frechet_limit(v, moments)),
        "kid": kid(x, y),
        "precision": Proportion.of(round(found.precision * len(x)), len(x)),
        "recall": Proportion.of(round(found.recall * len(y)), len(y)),
    }


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
