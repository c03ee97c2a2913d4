"""``shapes``: procedural pictures whose captions can be checked in the picture exactly.

    picture = render(spec(i)),   spec(i) a function of (seed, i) alone

A scene is one thing somewhere, two things in a relation, or two to five things alike; a thing is
colour x shape x size; every scene has a coloured background. Whatever a caption leaves out has its
default (medium, in the centre, on white), so that *every* caption states the whole scene but its
jitter of a few pixels (of two things: how they lie to each other, no more).

About a tenth of the 100 (colour, shape) pairs are held out. A twentieth of the scenes is made
around such a pair and held out; no other scene contains one. A model has seen "green" and
"heart", never a green heart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.source import DataError, Drawn, Example, in_fraction
from ldm.diffusion import stream

Colour: TypeAlias = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray"
]
Background: TypeAlias = Literal["white", "light gray", "cream", "sky blue", "mint", "black"]
Shape: TypeAlias = Literal[
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "hexagon",
    "cross",
    "ring",
    "pentagon",
]
Size: TypeAlias = Literal["small", "medium", "large"]
Position: TypeAlias = Literal[
    "at the top left", "at the top", "at the top right", "on the left", "in the centre",
    "on the right", "at the bottom left", "at the bottom", "at the bottom right",
]  # fmt: skip
Relation: TypeAlias = Literal["left of", "right of", "above", "below"]
Kind: TypeAlias = Literal["one", "two", "many"]
Point: TypeAlias = tuple[float, float]
Item = TypeVar("Item")

COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 135, 0),
    "yellow": (245, 215, 0),
    "green": (30, 145, 55),
    "blue": (30, 75, 225),
    "purple": (130, 40, 175),
    "pink": (255, 105, 185),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "gray": (125, 125, 125),
}
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light gray": (205, 205, 205),
    "cream": (255, 240, 190),
    "sky blue": (150, 210, 250),
    "mint": (165, 240, 200),
    "black": (15, 15, 15),
}
RADII: dict[Size, float] = {"small": 0.11, "medium": 0.175, "large": 0.29}
"""Half the extent of a thing, in units of the picture's side."""
HELD_OUT_PAIRS = 0.1
HELD_OUT_SCENES = 0.05

_OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
_PLACES: dict[Relation, Position] = {
    "left of": "on the left", "right of": "on the right", "above": "at the top",
    "below": "at the bottom",
}  # fmt: skip
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_MARGIN = 0.03
_POSITION_JITTER = 0.03
_RENDERER = 1  # part of every digest: raise it when the same scene is drawn differently
_OVERSAMPLING = 8


@dataclass(frozen=True)
class Thing:
    """One thing; ``x`` (rightwards) and ``y`` (down) of its centre in units of the side."""

    colour: Colour
    shape: Shape
    size: Size
    x: float
    y: float

    @property
    def radius(self) -> float:
        """All of it lies within this of its centre, along both axes; in units of the side."""
        return RADII[self.size]

    @property
    def pair(self) -> tuple[Colour, Shape]:
        """What may be held out."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Args:
        background: name of its colour.
        things: never overlapping; all alike if there are neither ``position`` nor ``relation``.
        position: of the only thing.
        relation: ``things[0]`` is ``relation`` ``things[1]``.
    """

    background: Background
    things: tuple[Thing, ...]
    position: Position | None = None
    relation: Relation | None = None

    @property
    def held_out(self) -> bool:
        """Whether it contains a held-out pair."""
        return any(is_held_out(*thing.pair) for thing in self.things)


@dataclass(frozen=True)
class ShapesData(Drawn):
    """Procedural pictures; the config *is* the source.

    Args:
        count: number of pictures.
        seed: other seeds give other pictures; the held-out pairs stay.
        size: side in pixels.
        hold_out: off, the same pictures are all trained on.
        scenes: one thing somewhere, two in a relation, two to five alike: each as often as it is
            named here.
        weight: share of the draws against other sources'; None: its number of pictures.
    """

    kind: Literal["shapes"] = "shapes"
    count: int = 20000
    seed: int = 0
    size: int = 64
    hold_out: bool = True
    scenes: tuple[Kind, ...] = get_args(Kind)
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.scenes:
            raise DataError(f"shapes: scenes is empty, name some of {', '.join(get_args(Kind))}")
        if self.count < 1:
            raise DataError(f"shapes: count={self.count} makes no picture, set it to at least 1")
        if self.size < 8:
            raise DataError(
                f"shapes: nothing can be told apart at size={self.size}, set at least 8"
            )

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """One example per scene."""
        scenes = (self.spec(index) for index in range(self.count))
        return tuple(
            Example(f"{index:06d}", captions(scene), self.hold_out and scene.held_out)
            for index, scene in enumerate(scenes)
        )

    def spec(self, index: int) -> Scene:
        """The scene of picture ``index``."""
        if not 0 <= index < self.count:
            raise IndexError(f"shapes: there is no picture {index} of {self.count}")
        return _scene(stream(self.seed, "shapes", index), self.scenes)

    def contrary(self, index: int, draw: np.random.Generator) -> str | None:
        """A caption of one of ``contraries``, worded as the caption of the same draw."""
        form = int(draw.integers(len(self.examples[index].captions)))
        others = contraries(self.spec(index))
        return captions(others[int(draw.integers(len(others)))])[form] if others else None

    def load(self, index: int) -> Image.Image:
        """RGB picture of side ``size``."""
        return render(self.spec(index), self.size)

    def digest(self, index: int) -> str:
        """SHA-256 of the scene, the renderer's version and the size."""
        record = {"scene": asdict(self.spec(index)), "renderer": _RENDERER, "size": self.size}
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def is_held_out(colour: Colour, shape: Shape) -> bool:
    """Whether the pair is never trained on."""
    return in_fraction(f"shapes: {colour} {shape}", HELD_OUT_PAIRS)


@cache
def contrasting(background: Background) -> tuple[Colour, ...]:
    """The colours that can be seen on ``background``."""
    return tuple(
        colour for colour, rgb in COLOURS.items() if math.dist(rgb, BACKGROUNDS[background]) >= 60
    )


@cache
def _pairs(background: Background, held_out: bool) -> tuple[tuple[Colour, Shape], ...]:
    return tuple(
        (colour, shape)
        for colour in contrasting(background)
        for shape in get_args(Shape)
        if is_held_out(colour, shape) == held_out
    )


class _Draws:
    """Choices of one scene from one generator."""

    def __init__(self, draw: np.random.Generator) -> None:
        # One call: a generator's overhead would be most of the cost of a scene.
        self._numbers = iter(draw.random(32).tolist())

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def choose(self, items: Sequence[Item]) -> Item:
        return items[int(next(self._numbers) * len(items))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)


def _scene(generator: np.random.Generator, kinds: Sequence[Kind]) -> Scene:
    draws = _Draws(generator)
    held_out = draws.chance(HELD_OUT_SCENES)
    # White is what an unnamed background is, so it is met more often.
    background = draws.choose(("white", "white", *get_args(Background)))
    pair = draws.choose(_pairs(background, held_out))
    kind = draws.choose(kinds)
    if kind == "one":
        return _one(draws, background, pair)
    if kind == "two":
        # The other thing may be anything in a held-out scene, and nothing held out in a training
        # scene.
        others = _pairs(background, False) + (_pairs(background, True) if held_out else ())
        return _two(draws, background, pair, tuple(other for other in others if other != pair))
    return _many(draws, background, pair)


def _place(x: float, y: float) -> Point:
    return round(x, 4), round(y, 4)


def middle(position: Position, size: Size) -> Point:
    """Where the centre of a lone thing of ``size`` at ``position`` lies, but for its jitter."""
    row, column = divmod(get_args(Position).index(position), 3)
    reach = 0.5 - RADII[size] - _MARGIN - _POSITION_JITTER
    return 0.5 + (column - 1) * reach, 0.5 + (row - 1) * reach


def _one(draws: _Draws, background: Background, pair: tuple[Colour, Shape]) -> Scene:
    size = draws.choose(get_args(Size))
    position = draws.choose((*("in the centre",) * 4, *get_args(Position)))
    x, y = (
        along + draws.between(-_POSITION_JITTER, _POSITION_JITTER)
        for along in middle(position, size)
    )
    thing = Thing(*pair, size, *_place(x, y))
    return Scene(background, (thing,), position=position)


def _two(
    draws: _Draws,
    background: Background,
    pair: tuple[Colour, Shape],
    others: tuple[tuple[Colour, Shape], ...],
) -> Scene:
    other = draws.choose(others)
    sizes = draws.choose(
        [(a, b) for a in get_args(Size) for b in get_args(Size) if RADII[a] + RADII[b] < 0.41]
    )
    relation = draws.choose(get_args(Relation))
    if draws.chance(0.5):
        pair, other = other, pair
    # From one edge to the other: gap, first, gap, second, gap.
    radii = [RADII[size] for size in sizes]
    first_is_lower = relation in ("left of", "above")
    low, high = radii if first_is_lower else radii[::-1]
    free = 1 - 2 * (low + high) - 3 * _MARGIN
    cuts = sorted((draws.between(0, free), draws.between(0, free)))
    along = [_MARGIN + cuts[0] + low, 1 - _MARGIN - (free - cuts[1]) - high]
    if not first_is_lower:
        along.reverse()
    across = [0.5 + draws.between(-0.06, 0.06) for _ in range(2)]
    sideways = relation in ("left of", "right of")
    places = zip(along, across, strict=True) if sideways else zip(across, along, strict=True)
    things = tuple(
        Thing(*which, size, *_place(x, y))
        for which, size, (x, y) in zip((pair, other), sizes, places, strict=True)
    )
    return Scene(background, things, relation=relation)


_LAYOUTS: dict[int, tuple[tuple[Point, ...], ...]] = {
    2: (((0.26, 0.5), (0.74, 0.5)), ((0.5, 0.26), (0.5, 0.74)), ((0.28, 0.28), (0.72, 0.72)),
        ((0.72, 0.28), (0.28, 0.72))),
    3: (((0.25, 0.27), (0.75, 0.27), (0.5, 0.73)), ((0.25, 0.73), (0.75, 0.73), (0.5, 0.27))),
    4: (((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),),
    5: (((0.235, 0.235), (0.765, 0.235), (0.5, 0.5), (0.235, 0.765), (0.765, 0.765)),),
}  # fmt: skip


def _many(draws: _Draws, background: Background, pair: tuple[Colour, Shape]) -> Scene:
    number = draws.choose((2, 3, 4, 5))
    # Five medium ones would touch once they are jittered.
    size = draws.choose(("small", "medium")) if number < 5 else "small"
    layout = draws.choose(_LAYOUTS[number])
    jitter = 0.04 if size == "small" and number < 5 else 0.025
    things = tuple(
        Thing(*pair, size, *_place(*(c + draws.between(-jitter, jitter) for c in centre)))
        for centre in layout
    )
    return Scene(background, things)


def _noun(thing: Thing, *, bare: bool, number: int = 1) -> str:
    size = "" if bare and thing.size == "medium" else f"{thing.size} "
    plural = "" if number == 1 else "es" if thing.shape == "cross" else "s"
    return f"{size}{thing.colour} {thing.shape}{plural}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Ways to say ``scene``, the first with everything named; only defaults are ever left out.

    Of two things the left or upper one is named first in about 70 %. Were both ways as frequent,
    neither the relation nor which thing is named first would say anything on its own of who is
    where, but only both together: a saddle of every loss. A text encoder regressed on thumbnails
    was at chance in it for 30k images; with three of four it was at 78 % by then.
    """
    ground = f"{scene.background} background"
    on = f" on {_with_article(ground)}"
    on_or_white = "" if scene.background == "white" else on
    first = scene.things[0]
    if scene.relation is not None:
        second, reverse = scene.things[1], _OPPOSITE[scene.relation]
        in_reading_order = scene.relation in ("left of", "above")
        upper, lower = (first, second) if in_reading_order else (second, first)
        forwards, backwards = (
            (scene.relation, reverse) if in_reading_order else (reverse, scene.relation)
        )

        def related(one: Thing, how: Relation, other: Thing, *, bare: bool) -> str:
            nouns = [_with_article(_noun(thing, bare=bare)) for thing in (one, other)]
            return f"{nouns[0]} {_towards(how, bare)} {nouns[1]}"

        def placed(*, bare: bool) -> str:
            told = [
                f"{_with_article(_noun(thing, bare=bare))} {_PLACES[how]}"
                for thing, how in ((upper, forwards), (lower, backwards))
            ]
            return " and ".join(told)

        bare = related(upper, forwards, lower, bare=True)
        return tuple(dict.fromkeys((
            f"{related(first, scene.relation, second, bare=False)}{on}",
            f"{related(second, reverse, first, bare=False)}{on}",
            f"{bare}{on_or_white}",
            f"{related(lower, backwards, upper, bare=True)}{on_or_white}",
            f"{_with_article(ground)} with {bare}",
            f"{placed(bare=False)}{on}",
            f"{placed(bare=True)}{on_or_white}",
        )))  # fmt: skip
    if scene.position is not None:
        full, bare = (_with_article(_noun(first, bare=bare)) for bare in (False, True))
        where = "" if scene.position == "in the centre" else f" {scene.position}"
        return tuple(dict.fromkeys((
            f"{full} {scene.position}{on}",
            f"{bare}{where}{on_or_white}",
            f"one {_noun(first, bare=True)}{where}{on_or_white}",
            f"{_with_article(ground)} with {bare} {scene.position}",
            f"{full}{where}, {ground}",
        )))  # fmt: skip
    number = len(scene.things)
    full, bare = (_noun(first, bare=bare, number=number) for bare in (False, True))
    return tuple(dict.fromkeys((
        f"{_NUMBERS[number]} {full}{on}",
        f"{_NUMBERS[number]} {bare}{on_or_white}",
        f"{number} {bare}{on_or_white}",
        f"{_with_article(ground)} with {_NUMBERS[number]} {bare}",
        f"{_NUMBERS[number]} {full}, {ground}",
    )))  # fmt: skip


def contraries(scene: Scene) -> tuple[Scene, ...]:
    """What the picture of ``scene`` is taken for by whoever reads its words in any order: of two
    things the relation reversed, or their colours, shapes or sizes exchanged.

    A scene that is trained on gets none with a held-out pair.
    """
    if scene.relation is None:
        return ()
    first, second = scene.things
    others = [replace(scene, relation=_OPPOSITE[scene.relation])]
    for name in ("colour", "shape", "size"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            exchanged = replace(first, **{name: other}), replace(second, **{name: one})
            others.append(replace(scene, things=exchanged))
    return tuple(other for other in others if scene.held_out or not other.held_out)


def _towards(relation: Relation, bare: bool) -> str:
    return relation if bare or relation in ("above", "below") else f"to the {relation}"


def render(scene: Scene, size: int) -> Image.Image:
    """``scene`` as an RGB picture of side ``size``, anti-aliased by eightfold oversampling."""
    side = size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for outline, ink in (
            (outlines(thing.shape)[0], COLOURS[thing.colour]),
            *((hole, BACKGROUNDS[scene.background]) for hole in outlines(thing.shape)[1:]),
        ):
            corners = [
                ((thing.x + thing.radius * x) * side, (thing.y + thing.radius * y) * side)
                for x, y in outline
            ]
            brush.polygon(corners, fill=ink)
    return canvas.reduce(_OVERSAMPLING)


@cache
def outlines(shape: Shape) -> tuple[tuple[Point, ...], ...]:
    """Polygons of ``shape`` in [-1, 1]^2, y down, centred; all but the first are holes."""

    def regular(corners: int, start: float, *radii: float) -> list[Point]:
        """Corners on circles of ``radii`` in turn, the first at angle ``start``."""
        angles = (start + 2 * math.pi * k / corners for k in range(corners))
        return [
            (radii[k % len(radii)] * math.cos(angle), radii[k % len(radii)] * math.sin(angle))
            for k, angle in enumerate(angles)
        ]

    up = -math.pi / 2
    if shape == "circle":
        return (_fitted(regular(64, 0, 1)),)
    if shape == "ring":
        return _fitted(regular(64, 0, 1)), tuple(regular(64, 0, 0.55))
    if shape == "square":
        return (_fitted(regular(4, math.pi / 4, 1), 0.86),)
    if shape == "triangle":
        return (_fitted(regular(3, up, 1)),)
    if shape == "star":
        return (_fitted(regular(10, up, 1, 0.42)),)
    if shape == "hexagon":
        return (_fitted(regular(6, 0, 1)),)
    if shape == "pentagon":
        return (_fitted(regular(5, up, 1)),)
    if shape == "diamond":
        return (((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),)
    if shape == "cross":
        a, b = 0.32, 0.95
        return (
            ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
             (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)),
        )  # fmt: skip
    heart = []
    for k in range(64):
        t = 2 * math.pi * k / 64
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        heart.append((16 * math.sin(t) ** 3, -y))
    return (_fitted(heart),)


def _fitted(points: Sequence[Point], extent: float = 1) -> tuple[Point, ...]:
    """``points`` moved and scaled: the longer side of their box becomes [-extent, extent]."""
    (left, right), (top, bottom) = ((min(c), max(c)) for c in zip(*points, strict=True))
    scale = 2 * extent / max(right - left, bottom - top)
    return tuple(
        ((x - (left + right) / 2) * scale, (y - (top + bottom) / 2) * scale) for x, y in points
    )
