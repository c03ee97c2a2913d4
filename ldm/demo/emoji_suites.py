"""What a model draws of emoji: those it knows, on backgrounds it does not know them on, and in the
style it has not seen them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.data.items import evenly_spaced
from ldm.demo.checker import background_of
from ldm.demo.emoji import COLOURED, EmojiData, Group, Style
from ldm.demo.scene import BACKGROUNDS, Background
from ldm.demo.style import StyleReader
from ldm.diffusion import Objective, stream
from ldm.evaluation.distances import Figure, mean
from ldm.evaluation.features import Space
from ldm.evaluation.heldout import held_out_loss
from ldm.evaluation.reference import TrueFeatures
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.evaluation.runner import Evaluator, References
from ldm.evaluation.suites import Draw, Report

_GROUPS: tuple[Group, ...] = (
    "smileys", "people", "animals", "food", "travel", "activities", "objects",
)  # fmt: skip


FEWEST = 2 * len(COLOURED)
"""Captions of ``recombined``: of fewer than two a background none can be shuffled."""


class Emoji:
    """The gallery of both styles, as ``transform`` makes them.

    Args:
        transform: how the model sees a picture.
        groups: of the emoji; those that the shipped model was trained on by default.
    """

    def __init__(self, transform: ImageTransform, groups: tuple[Group, ...] = _GROUPS) -> None:
        self.source, self.transform = EmojiData(groups=groups), transform
        examples = self.source.examples
        self.style: list[Style] = [
            next(s for s in get_args(Style) if e.key.startswith(f"{s}/")) for e in examples
        ]
        self.held_out = [n for n, e in enumerate(examples) if e.held_out]
        self.trained = [n for n, e in enumerate(examples) if not e.held_out]
        self._numbers = {e.key: n for n, e in enumerate(examples)}
        self._features: dict[Background, TrueFeatures] = {}

    @cached_property
    def gallery(self) -> Tensor:
        """All pictures, ``n 3 h w``."""
        return self.pictures(range(len(self.source.examples)))

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """Those of these ``numbers``."""
        return self._seen(self.transform, numbers)

    def features(self, space: Space, background: Background = "white") -> Tensor:
        """Those of the gallery, ``n d``."""
        if background not in self._features:
            every = range(len(self.source.examples))
            self._features[background] = TrueFeatures(
                lambda: map(self.source.digest, every),
                lambda: self.gallery if background == "white" else self.on(background, every),
                self._laid_on(background),
            )
        return self._features[background](space)

    def on(self, background: Background, numbers: Sequence[int]) -> Tensor:
        """Pictures of these ``numbers`` on a background."""
        return self._seen(self._laid_on(background), numbers)

    def _laid_on(self, background: Background) -> ImageTransform:
        return replace(self.transform, background=BACKGROUNDS[background])

    def _seen(self, transform: ImageTransform, numbers: Sequence[int]) -> Tensor:
        return torch.stack([to_pixels(transform(self.source.load(n))) for n in numbers])

    @cached_property
    def styles(self) -> Tensor:
        """Number of each picture's style, ``n``."""
        return torch.tensor([get_args(Style).index(style) for style in self.style])

    @cached_property
    def read_style(self) -> StyleReader:
        """Reads the number of a picture's style; it has seen all trained pictures."""
        return StyleReader(self.gallery[self.trained], self.styles[self.trained])

    @cached_property
    def concepts(self) -> Tensor:
        """Number of each picture's concept, ``n``; the two of one concept share it."""
        names = [example.key.split("/")[1] for example in self.source.examples]
        numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    def in_the_other_style(self, number: int) -> int | None:
        """The same concept's other picture, if there is one."""
        style, concept = self.source.examples[number].key.split("/")
        others = (self._numbers.get(f"{s}/{concept}") for s in get_args(Style) if s != style)
        return next((n for n in others if n is not None), None)

    def caption(self, number: int) -> str:
        """The first caption of picture ``number``."""
        return self.source.examples[number].captions[0]


def _others(n: int) -> Tensor:
    """Which of ``n`` captions, two or more, each picture is shown beside as a floor, never its own:
    one cycle through all of them, in an order that knows nothing of styles or groups.
    """
    cycle = torch.from_numpy(stream(0, "other captions").permutation(n))
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def retrieval(draw: Draw, emoji: Emoji, spaces: Sequence[Space], count: int = 500) -> Report:
    """Whether the nearest of all pictures is the one the caption names, for ``count`` training
    captions; ``shuffled`` is the floor, drawn pictures against other captions.
    """
    chosen = evenly_spaced(emoji.trained, count)
    texts = [emoji.caption(n) for n in chosen]
    drawn, truth = draw(texts), torch.tensor(chosen)
    figures: dict[str, Figure | Proportion] = {}
    for space in spaces:
        gallery, queries = emoji.features(space), space(drawn)
        rank = ranks(queries, gallery, truth)
        floor = ranks(queries, gallery, truth[_others(len(truth))])
        for k in (1, 5):
            hits = Proportion.of(int((rank < k).sum()), len(chosen))
            figures[f"top-{k}, {space.name}"] = hits
            shuffled = Proportion.of(int((floor < k).sum()), len(chosen))
            figures[f"top-{k} shuffled, {space.name}"] = shuffled
    return Report(figures, texts, drawn)


def recombined(
    draw: Draw,
    emoji: Emoji,
    spaces: Sequence[Space],
    reconstruct: Callable[[Tensor], Tensor],
    count: int = 200,
) -> Report:
    """Known emoji, each on the coloured background that it is never trained on with: words that
    were trained on, in captions that never were. Pictures that fill their square are left out.

    ``background``: its colour is the nearest named one. ``top-k``: the nearest of all emoji, put on
    that background, are the one asked for; ``both`` at once. Ceiling: the true picture on that
    background through the autoencoder; floor (``shuffled``): the emoji of other captions.

    Raises:
        ValueError: fewer than ``FEWEST`` captions.
    """
    grounds = COLOURED
    if count < FEWEST:
        raise ValueError(f"{count} captions are too few: {FEWEST} at least")
    chosen: list[tuple[int, int]] = []
    for k, name in enumerate(grounds):
        mine = [
            n
            for n in emoji.trained
            if emoji.source.concept(n).unseen_background == name
            and background_of(to_image(emoji.gallery[n])) == "white"
        ]
        chosen += [(n, k) for n in evenly_spaced(mine, (count + k) // len(grounds))]
    truth, ground = torch.tensor(chosen).unbind(1)
    texts = [
        f"{emoji.caption(n)}, on a {grounds[k]} background"
        for n, k in zip(truth.tolist(), ground.tolist(), strict=True)
    ]
    drawn = draw(texts)
    real, other = torch.empty_like(drawn), torch.empty_like(truth)
    places = [(ground == k).nonzero()[:, 0] for k in range(len(grounds))]
    for name, here in zip(grounds, places, strict=True):
        real[here] = emoji.on(name, truth[here].tolist())
        other[here] = truth[here][_others(len(here))]
    real = reconstruct(real)

    def right(pictures: Tensor) -> Tensor:
        pairs = zip(pictures, ground.tolist(), strict=True)
        return torch.tensor([background_of(to_image(x)) == grounds[k] for x, k in pairs])

    def share(hits: Tensor) -> Proportion:
        return Proportion.of(int(hits.sum()), len(hits))

    on_drawn, on_real = right(drawn), right(real)
    figures: dict[str, Figure | Proportion] = {
        "background": share(on_drawn), "background ceiling": share(on_real),
    }  # fmt: skip
    for space in spaces:
        seen = space(drawn)
        for told, queries, asked, placed in (
            ("", seen, truth, on_drawn),
            (" ceiling", space(real), truth, on_real),
            (" shuffled", seen, other, on_drawn),
        ):
            rank = torch.empty_like(truth)
            for name, here in zip(grounds, places, strict=True):
                rank[here] = ranks(queries[here], emoji.features(space, name), asked[here])
            for k in (1, 5):
                figures[f"top-{k}{told}, {space.name}"] = share(rank < k)
                figures[f"both (top-{k}){told}, {space.name}"] = share(placed & (rank < k))
    return Report(figures, texts, drawn)


def transfer(
    draw: Draw,
    emoji: Emoji,
    spaces: Sequence[Space],
    reconstruct: Callable[[Tensor], Tensor],
    count: int | None = None,
) -> Report:
    """Held-out (concept, style) pairs of concepts that were seen in the other style.

    ``style``: it is read off the shading (``StyleReader``), in all and of each asked style.
    ``concept``: among all concepts the asked one is the first, or one of the first five, each as
    near as the nearer of its two pictures, for a known thing in another style need not look as its
    draughtsmen decided; ``both``: and the style is right. ``picture``: among pictures of the asked
    style the true one, which was never seen, is the first, or one of the first five; ``distance``:
    to the true one, Euclidean.

    Ceiling: the true picture through the autoencoder; floor (``shuffled``): against the captions in
    another order; ``other style``: what the model has seen, the concept's picture in its other
    style, in place of what it draws (its concept is right by definition). All pairs, or ``count``.

    Raises:
        FeatureError: what reads styles is not installed.
        ValueError: fewer than two concepts are held out in one of two styles.
    """
    read = emoji.read_style
    pairs = [(n, emoji.in_the_other_style(n)) for n in emoji.held_out]
    pairs = [(n, other) for n, other in pairs if other is not None]
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} of these emoji are held out in one of two styles: too few")
    truth, known = torch.tensor(evenly_spaced(pairs, count or len(pairs))).unbind(1)
    texts = [emoji.caption(n) for n in truth.tolist()]
    drawn, real = draw(texts), reconstruct(emoji.gallery[truth])
    figures: dict[str, Figure | Proportion] = {}

    def tell(key: str, hits: Tensor) -> None:
        figures[key] = Proportion.of(int(hits.sum()), len(hits))

    shuffled, style = truth[_others(len(truth))], read(drawn)
    styled = {
        "": style == emoji.styles[truth],
        " ceiling": read(real) == emoji.styles[truth],
        " shuffled": style == emoji.styles[shuffled],
        " other style": read(emoji.gallery[known]) == emoji.styles[truth],
    }
    for name, hits in styled.items():
        tell(f"style{name}", hits)
    for number, name in enumerate(get_args(Style)):
        if (asked := emoji.styles[truth] == number).any():
            tell(f"style, {name}", styled[""][asked])
    for space in spaces:
        gallery, seen = emoji.features(space), space(drawn)
        for name, queries, asked in (
            ("", seen, truth),
            (" ceiling", space(real), truth),
            (" shuffled", seen, shuffled),
            (" other style", gallery[known], truth),
        ):
            distance = torch.cdist(queries.double(), gallery.double())
            nearer = distance.new_full((len(queries), len(gallery)), torch.inf).scatter_reduce(
                1, emoji.concepts.expand_as(distance), distance, "amin"
            )
            other_style = emoji.styles[None] != emoji.styles[asked][:, None]
            among = distance.masked_fill(other_style, torch.inf)
            named, found = (
                (table <= table.gather(1, own[:, None])).sum(1) - 1
                for table, own in ((nearer, emoji.concepts[asked]), (among, asked))
            )
            figures[f"distance{name}, {space.name}"] = mean((queries - gallery[asked]).norm(dim=1))
            for k in (1, 5):
                if name != " other style":
                    tell(f"concept top-{k}{name}, {space.name}", named < k)
                    tell(f"both (top-{k}){name}, {space.name}", styled[name] & (named < k))
                tell(f"picture top-{k}{name}, {space.name}", found < k)
    return Report(figures, texts, drawn)


def prepare(truth: References, count: int) -> None:
    """Makes the gallery and its features."""
    emoji = truth.once(Emoji)
    for space in truth.spaces:
        emoji.features(space)


def prepare_new(truth: References, count: int) -> None:
    """The same; ``ValueError`` for too few captions."""
    if count < FEWEST:
        raise ValueError(f"emoji-new: {count} captions, at least {FEWEST}")
    prepare(truth, count)


def prepare_transfer(truth: References, count: int) -> None:
    """The same, and what reads styles."""
    prepare(truth, count)
    _ = truth.once(Emoji).read_style


def known(model: Evaluator, draw: Draw, count: int) -> Report:
    """``retrieval`` of ``count`` captions."""
    return retrieval(draw, model.truth.once(Emoji), model.truth.spaces, count)


def new(model: Evaluator, draw: Draw, count: int) -> Report:
    """``recombined`` of ``count`` captions."""
    emoji, spaces = model.truth.once(Emoji), model.truth.spaces
    return recombined(draw, emoji, spaces, model.reconstruct, count)


def transferred(model: Evaluator, draw: Draw, count: int) -> Report:
    """``transfer`` of ``count`` pairs, of all if that is 0."""
    emoji, spaces = model.truth.once(Emoji), model.truth.spaces
    return transfer(draw, emoji, spaces, model.reconstruct, count or None)


@torch.no_grad()
def loss(model: Evaluator, draw: Draw, count: int) -> Report:
    """The loss of ``count`` held-out emoji, by noise level; nothing is drawn."""
    emoji, codec, pipe = model.truth.once(Emoji), model.codec, model.pipe
    chosen = evenly_spaced(emoji.held_out, count)
    texts, truth = [emoji.caption(n) for n in chosen], emoji.pictures(chosen)
    parts = [codec.encode(x.to(pipe.device)) for x in truth.split(64)]
    z = torch.cat([codec.sample(m, torch.zeros_like(m.mean)) for m in parts])
    process, target, learned = model.noise()
    process = process.seen_at(pipe.family.tokens(pipe.network, z))
    objective = Objective(target, learned_variance=learned)
    cond = pipe.conditioner.encode(texts)
    found = held_out_loss(objective, process, pipe.denoiser, z.float(), cond)
    return Report(dict(found), texts, None)
