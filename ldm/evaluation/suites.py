"""What a model draws for fixed captions, measured.

    suite(draw, ...) -> Report:   captions -> pictures -> figures with 95 % intervals

Every suite has captions of its own, the same for every model, and tells its ceiling and its floor
where those are not plain. Nothing in a suite was trained on what it measures, but a space of
features may have been (``ldm.evaluation.features``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.data.collection import spread
from ldm.data.emoji import EmojiData, Group, Style
from ldm.data.images import to_image
from ldm.data.shapes import BACKGROUNDS, Background, Scene, ShapesData, captions, render
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
from ldm.evaluation.features import Space
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.evaluation.shapes import Verdict, background_of, compare, read

Draw = Callable[[Sequence[str]], Tensor]
"""Captions to pictures ``n 3 h w`` in [-1, 1], picture n from the n-th seed."""
Pixels = Callable[[Image.Image], Tensor]
"""A true picture as the model's codec sees it, ``3 h w`` in [-1, 1]."""

_GROUPS: tuple[Group, ...] = (
    "smileys", "people", "animals", "food", "travel", "activities", "objects",
)  # fmt: skip


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
    """What of ``asked`` the pictures show, read by an exact checker (``ldm.evaluation.shapes``).

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
    asked: Sequence[Scene], pixels: Pixels, reconstruct: Callable[[Tensor], Tensor]
) -> Proportion:
    """Share of the true pictures of ``asked`` of which everything is read right behind the
    autoencoder: the ceiling of ``prompt_accuracy``.
    """
    true = torch.stack([pixels(render(scene, ShapesData.size)) for scene in asked])
    seen = [read(to_image(x)) for x in reconstruct(true)]
    hits = sum(compare(s, scene).whole for s, scene in zip(seen, asked, strict=True))
    return Proportion.of(hits, len(asked))


class Emoji:
    """The gallery of both styles, as ``pixels`` makes them.

    Args:
        pixels: how the model sees a picture.
        groups: of the emoji; those that the shipped model was trained on by default.
    """

    def __init__(self, pixels: Pixels, groups: tuple[Group, ...] = _GROUPS) -> None:
        self.source, self._pixels = EmojiData(groups=groups), pixels
        examples = self.source.examples
        self.gallery = torch.stack([pixels(self.source.load(n)) for n in range(len(examples))])
        self.style: list[Style] = [
            next(s for s in get_args(Style) if e.key.startswith(f"{s}/")) for e in examples
        ]
        self.held_out = [n for n, e in enumerate(examples) if e.held_out]
        self.trained = [n for n, e in enumerate(examples) if not e.held_out]
        self._numbers = {e.key: n for n, e in enumerate(examples)}

        self._features: dict[str, Tensor] = {}

    def features(self, space: Space) -> Tensor:
        """Those of the gallery, ``n d``, made once."""
        if space.name not in self._features:
            self._features[space.name] = space(self.gallery)
        return self._features[space.name]

    def on(self, background: Background) -> Tensor:
        """The gallery on another background than white."""
        ground = Image.new("RGBA", (self.source.size,) * 2, BACKGROUNDS[background])
        pictures = (self.source.load(n) for n in range(len(self.gallery)))
        return torch.stack(
            [self._pixels(Image.alpha_composite(ground, picture)) for picture in pictures]
        )

    def in_the_other_style(self, number: int) -> int | None:
        """The same concept's other picture, if there is one."""
        style, concept = self.source.examples[number].key.split("/")
        others = (self._numbers.get(f"{s}/{concept}") for s in get_args(Style) if s != style)
        return next((n for n in others if n is not None), None)

    def caption(self, number: int) -> str:
        """The first caption of picture ``number``."""
        return self.source.examples[number].captions[0]


def retrieval(draw: Draw, emoji: Emoji, spaces: Sequence[Space], count: int = 500) -> Report:
    """Whether the nearest of all pictures is the one the caption names, for ``count`` training
    captions; ``shuffled`` is the floor, drawn pictures against other captions.
    """
    chosen = spread(emoji.trained, count)
    texts = [emoji.caption(n) for n in chosen]
    drawn, truth = draw(texts), torch.tensor(chosen)
    figures: dict[str, Figure | Proportion] = {}
    for space in spaces:
        gallery, queries = emoji.features(space), space(drawn)
        rank = ranks(queries, gallery, truth)
        floor = ranks(queries, gallery, truth.roll(len(truth) // 2))
        for k in (1, 5):
            hits = Proportion.of(int((rank < k).sum()), len(chosen))
            figures[f"top-{k}, {space.name}"] = hits
            shuffled = Proportion.of(int((floor < k).sum()), len(chosen))
            figures[f"top-{k} shuffled, {space.name}"] = shuffled
    return Report(figures, texts, drawn)


def recombined(draw: Draw, emoji: Emoji, spaces: Sequence[Space], count: int = 200) -> Report:
    """Known emoji on a coloured background, as only ``shapes`` has them: words that were trained
    on, in captions that never were.

    ``background``: its colour is the nearest named one. ``top-k``: the nearest of all emoji, put on
    that background, are the one asked for; ``both`` at once. ``shuffled`` is the floor, the
    captions of other pictures on the same background.
    """
    grounds: list[Background] = [name for name in get_args(Background) if name != "white"]
    numbers = spread(emoji.trained, count)
    asked = [grounds[k % len(grounds)] for k in range(len(numbers))]
    texts = [
        f"{emoji.caption(n)}, {ground} background" for n, ground in zip(numbers, asked, strict=True)
    ]
    drawn, truth = draw(texts), torch.tensor(numbers)
    right = torch.tensor(
        [background_of(to_image(x)) == ground for x, ground in zip(drawn, asked, strict=True)]
    )
    rank, floor = ({s.name: torch.zeros_like(truth) for s in spaces} for _ in range(2))
    for ground in grounds:
        mine = torch.tensor([name == ground for name in asked])
        gallery = emoji.on(ground)
        for s in spaces:
            features, queries, own = s(gallery), s(drawn[mine]), truth[mine]
            rank[s.name][mine] = ranks(queries, features, own)
            floor[s.name][mine] = ranks(queries, features, own.roll(len(own) // 2))

    def share(hits: Tensor) -> Proportion:
        return Proportion.of(int(hits.sum()), len(hits))

    figures: dict[str, Figure | Proportion] = {"background": share(right)}
    for name in rank:
        for k in (1, 5):
            figures[f"top-{k}, {name}"] = share(rank[name] < k)
            figures[f"top-{k} shuffled, {name}"] = share(floor[name] < k)
            figures[f"both (top-{k}), {name}"] = share(right & (rank[name] < k))
    return Report(figures, texts, drawn)


def transfer(
    draw: Draw,
    emoji: Emoji,
    spaces: Sequence[Space],
    reconstruct: Callable[[Tensor], Tensor],
    count: int | None = None,
) -> Report:
    """Held-out (concept, style) pairs: the concept was seen in the other style only.

    ``style``: the nearest of all other pictures has the asked style. ``concept``: among pictures
    of that style the true one is the first, or one of the first five. Ceiling: the true picture
    through the autoencoder; floor: against the caption of another pair; ``other style``: what the
    model has seen, the concept's picture in its other style, in place of what it draws. All of
    them, or ``count``.
    """
    chosen = spread(emoji.held_out, count or len(emoji.held_out))
    # Some concepts there are in one style only.
    pairs = [(n, other) for n in chosen if (other := emoji.in_the_other_style(n)) is not None]
    known = torch.tensor(pairs).reshape(-1, 2)
    texts = [emoji.caption(n) for n in chosen]
    drawn, truth = draw(texts), torch.tensor(chosen)
    real = reconstruct(emoji.gallery[truth])
    style = torch.tensor([get_args(Style).index(s) for s in emoji.style])
    figures: dict[str, Figure | Proportion] = {}
    for space in spaces:
        gallery, seen = emoji.features(space), space(drawn)
        for name, queries, asked in (
            ("", seen, truth),
            (" ceiling", space(real), truth),
            (" shuffled", seen, truth.roll(len(truth) // 2)),
            (" other style", gallery[known[:, 1]], known[:, 0]),
        ):
            distance = torch.cdist(queries.double(), gallery.double())
            other = style[None] != style[asked][:, None]
            own = distance.gather(1, asked[:, None])
            among = distance.masked_fill(other, torch.inf)
            rank = (among <= own).sum(1) - 1
            # The picture itself would tell its own style.
            nearest = distance.scatter(1, asked[:, None], torch.inf).argmin(1)
            styled = style[nearest] == style[asked]
            for key, hits in (
                ("style", styled),
                ("concept top-1", rank < 1),
                ("concept top-5", rank < 5),
            ):
                figures[f"{key}{name}, {space.name}"] = Proportion.of(int(hits.sum()), len(asked))
    return Report(figures, texts, drawn)


def prompts(
    draw: Draw,
    lists: Mapping[str, Sequence[str]],
    fit: Callable[[Sequence[str], Tensor], Tensor] | None = None,
) -> Report:
    """Pictures of ``lists`` of prompts, for people to look at; with ``fit`` (see ``quality``) the
    mean CLIP score of each.
    """
    texts = [text for several in lists.values() for text in several]
    drawn, figures, start = draw(texts), {}, 0
    for name, several in lists.items():
        if fit is not None:
            mine = drawn[start : start + len(several)]
            figures[f"clip score, {name}"] = mean(fit(several, mine))
        start += len(several)
    return Report(figures, texts, drawn)


def quality(
    draw: Draw,
    texts: Sequence[str],
    truth: Tensor,
    spaces: Sequence[Space],
    fit: Callable[[Sequence[str], Tensor], Tensor] | None = None,
) -> Report:
    """How near what is drawn for ``texts`` lies to ``truth``, ``m 3 h w``, as sets.

    ``frechet`` is biased upwards at a finite number of pictures, which stands beside it;
    ``frechet limit`` and ``kid`` are not. ``clip score`` is the mean of ``fit``, which gives one
    number for each text and its picture.
    """
    drawn = draw(texts)
    figures: dict[str, Figure | Proportion] = {}
    if fit is not None:
        figures["clip score"] = mean(fit(texts, drawn))
    for space in spaces:
        found = nearness(space(drawn), space(truth))
        figures |= {f"{key}, {space.name}": figure for key, figure in found.items()}
    return Report(figures, list(texts), drawn)


def nearness(x: Tensor, y: Tensor) -> dict[str, Figure | Proportion]:
    """Of drawn features ``n d`` to true ones ``m d``: Frechet distance, its limit, KID, precision
    and recall.
    """
    moments, found = Moments.of(y), precision_recall(x, y)
    return {
        "frechet": jackknife(x, lambda v: frechet(Moments.of(v), moments)),
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
