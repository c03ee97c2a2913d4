"""A scene of ``shapes``: what it says, and how it is drawn.

It is one thing somewhere, two things in a relation, or two to five things alike; a thing is colour
x shape x size; every scene has a coloured background. Whatever a caption leaves out has its default
(medium, in the centre, on white), so that *every* caption states the whole scene but its jitter of
a few pixels (of two things: how they lie to each other, no more).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias, get_args

from PIL import Image, ImageDraw

from ldm.data.source import in_fraction

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
Point: TypeAlias = tuple[float, float]

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
POSITION_JITTER = 0.03
"""How far from its ``middle`` a lone thing may lie, along each axis."""
MARGIN = 0.03
"""Least distance to the edge and between things."""
RENDERER = 1
"""Part of every digest: raised when the same scene is drawn differently."""

_OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
_PLACES: dict[Relation, Position] = {
    "left of": "on the left", "right of": "on the right", "above": "at the top",
    "below": "at the bottom",
}  # fmt: skip
_NUMBERS = ("no", "one", "two", "three", "four", "five")
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


def middle(position: Position, size: Size) -> Point:
    """Where the centre of a lone thing of ``size`` at ``position`` lies, but for its jitter."""
    row, column = divmod(get_args(Position).index(position), 3)
    reach = 0.5 - RADII[size] - MARGIN - POSITION_JITTER
    return 0.5 + (column - 1) * reach, 0.5 + (row - 1) * reach


def _noun(thing: Thing, *, bare: bool, number: int = 1) -> str:
    size = "" if bare and thing.size == "medium" else f"{thing.size} "
    plural = "" if number == 1 else "es" if thing.shape == "cross" else "s"
    return f"{size}{thing.colour} {thing.shape}{plural}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Ways to say ``scene``, the first with everything named, each once; only defaults are ever
    left out.
    """
    return tuple(dict.fromkeys(wordings(scene)))


def wordings(scene: Scene) -> tuple[str, ...]:
    """``scene`` in every form of words that scenes of its kind have; where defaults are left out
    two may be the same.

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
        return (
            f"{related(first, scene.relation, second, bare=False)}{on}",
            f"{related(second, reverse, first, bare=False)}{on}",
            f"{bare}{on_or_white}",
            f"{related(lower, backwards, upper, bare=True)}{on_or_white}",
            f"{_with_article(ground)} with {bare}",
            f"{placed(bare=False)}{on}",
            f"{placed(bare=True)}{on_or_white}",
        )  # fmt: skip
    if scene.position is not None:
        full, bare = (_with_article(_noun(first, bare=bare)) for bare in (False, True))
        where = "" if scene.position == "in the centre" else f" {scene.position}"
        return (
            f"{full} {scene.position}{on}",
            f"{bare}{where}{on_or_white}",
            f"one {_noun(first, bare=True)}{where}{on_or_white}",
            f"{_with_article(ground)} with {bare} {scene.position}",
            f"{full}{where}, {ground}",
        )  # fmt: skip
    number = len(scene.things)
    full, bare = (_noun(first, bare=bare, number=number) for bare in (False, True))
    return (
        f"{_NUMBERS[number]} {full}{on}",
        f"{_NUMBERS[number]} {bare}{on_or_white}",
        f"{number} {bare}{on_or_white}",
        f"{_with_article(ground)} with {_NUMBERS[number]} {bare}",
        f"{_NUMBERS[number]} {full}, {ground}",
    )  # fmt: skip


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


def alterations(scene: Scene) -> tuple[Scene, ...]:
    """The scene of one thing with any other shape, place, colour or size of it, so that one that is
    drawn of them has another size in 7 % alone; none of other scenes. A scene that is trained on
    gets none with a held-out pair.
    """
    if scene.position is None:
        return ()
    (thing,) = scene.things
    named = {
        "shape": get_args(Shape),
        "colour": contrasting(scene.background),
        "size": get_args(Size),
    }
    others = [
        replace(scene, things=(replace(thing, **{name: value}),))
        for name, values in named.items()
        for value in values
        if value != getattr(thing, name)
    ]
    others += [replace(scene, position=p) for p in get_args(Position) if p != scene.position]
    return tuple(other for other in others if scene.held_out or not other.held_out)


def _towards(relation: Relation, bare: bool) -> str:
    return relation if bare or relation in ("above", "below") else f"to the {relation}"


def render(scene: Scene, size: int, width: int | None = None) -> Image.Image:
    """``scene`` as an RGB picture of side ``size``, anti-aliased by eightfold oversampling; with
    ``width`` in the middle of a picture that wide.
    """
    side = size * _OVERSAMPLING
    wide = (width or size) * _OVERSAMPLING
    canvas = Image.new("RGB", (wide, side), BACKGROUNDS[scene.background])
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for outline, ink in (
            (outlines(thing.shape)[0], COLOURS[thing.colour]),
            *((hole, BACKGROUNDS[scene.background]) for hole in outlines(thing.shape)[1:]),
        ):
            corners = [
                (
                    (thing.x + thing.radius * x) * side + (wide - side) / 2,
                    (thing.y + thing.radius * y) * side,
                )
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
