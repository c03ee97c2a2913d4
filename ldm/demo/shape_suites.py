"""What a model draws of ``shapes``: whether an exact checker reads back what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.demo.checker import Verdict, compare, read
from ldm.demo.scene import Scene, captions, render
from ldm.demo.shapes import Kind, ShapesData
from ldm.evaluation.distances import Figure, bootstrap
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.runner import Evaluator
from ldm.evaluation.suites import Draw, Report


def known(model: Evaluator, draw: Draw, count: int) -> Report:
    """``prompt_accuracy`` of ``count`` scenes as they are trained on, and its ceiling."""
    return _measured(model, draw, scenes(count, held_out=False))


def unseen(model: Evaluator, draw: Draw, count: int) -> Report:
    """The same of scenes with a held-out (colour, shape) pair."""
    return _measured(model, draw, scenes(count, held_out=True))


def _measured(model: Evaluator, draw: Draw, asked: Sequence[Scene]) -> Report:
    report = prompt_accuracy(draw, asked)
    ceiling = model.truth.once(Ceilings)(asked, model.reconstruct)
    return replace(report, figures=report.figures | {"everything, ceiling": ceiling})


def scenes(
    count: int, *, held_out: bool, seed: int = 1, kinds: tuple[Kind, ...] = get_args(Kind)
) -> list[Scene]:
    """``count`` scenes of ``shapes``, of some ``kinds``, with a held-out (colour, shape) pair, or
    without any; the seed is not one that models are trained on by default.
    """
    source = ShapesData(count=max(1000, 60 * count), seed=seed, scenes=kinds)
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
        def of(x: Tensor) -> Tensor:
            found = x.sum(-2)
            return found[..., list(columns)].sum(-1) / (found[..., 3] * len(columns))

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


class Ceilings:
    """``readable`` of one autoencoder, once for the same scenes."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self._known: dict[tuple[Scene, ...], Proportion] = {}

    def __call__(
        self, asked: Sequence[Scene], reconstruct: Callable[[Tensor], Tensor]
    ) -> Proportion:
        """The ceiling of ``asked``."""
        scenes = tuple(asked)
        if scenes not in self._known:
            self._known[scenes] = readable(asked, self.transform, reconstruct)
        return self._known[scenes]
