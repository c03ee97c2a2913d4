"""``shapes``: procedural pictures whose captions can be checked in the picture exactly.

    picture = render(spec(i)),   spec(i) a scene that is a function of (seed, i) alone

About a tenth of the 100 (colour, shape) pairs are held out. A twentieth of the scenes is made
around such a pair and held out; no other scene contains one. A model has seen "green" and
"heart", never a green heart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
from PIL import Image

from ldm.data.ranges import Count, Seed, Side, Weight
from ldm.data.source import Drawn, Example
from ldm.demo.scene import (
    MARGIN,
    POSITION_JITTER,
    RADII,
    RENDERER,
    Background,
    Colour,
    Point,
    Position,
    Relation,
    Scene,
    Shape,
    Size,
    Thing,
    alterations,
    captions,
    contraries,
    contrasting,
    is_held_out,
    middle,
    render,
    wordings,
)
from ldm.diffusion import stream
from ldm.errors import DataError

Kind: TypeAlias = Literal["one", "two", "many"]
Item = TypeVar("Item")

HELD_OUT_SCENES = 0.05


@dataclass(frozen=True)
class ShapesData(Drawn):
    """Procedural pictures; the config *is* the source.

    Args:
        count: number of pictures.
        seed: other seeds give other pictures; the held-out pairs stay.
        size: side in pixels; of a wide picture its height.
        width: pictures are this wide, the scene of side ``size`` in the middle of its background;
            None: they are square.
        hold_out: off, the same pictures are all trained on.
        scenes: one thing somewhere, two in a relation, two to five alike: each as often as it is
            named here.
        contrary_scenes: of which scenes a training with contraries is told texts that are false of
            them, where a default that is left out is meant: of ``two`` things with something
            exchanged, of ``one`` with another shape, place, colour or size.
        weight: share of the draws against other sources'; None: its number of pictures.
    """

    kind: Literal["shapes"] = "shapes"
    count: Count = 20000
    seed: Seed = 0
    size: Side = 64
    width: Side | None = None
    hold_out: bool = True
    scenes: tuple[Kind, ...] = get_args(Kind)
    contrary_scenes: tuple[Literal["one", "two"], ...] = ("two",)
    weight: Weight | None = None

    def __post_init__(self) -> None:
        if not self.scenes:
            raise DataError(f"shapes: scenes is empty, name some of {', '.join(get_args(Kind))}")
        if self.count < 1:
            raise DataError(f"shapes: count={self.count} makes no picture, set it to at least 1")
        if self.size < 8:
            raise DataError(
                f"shapes: nothing can be told apart at size={self.size}, set at least 8"
            )
        if self.width is not None and self.width < self.size:
            raise DataError(
                f"shapes: width={self.width} leaves no room for a scene of size={self.size}, set at"
                " least as much"
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
        """A caption of a scene that is another (``contraries`` of ``ldm.demo.scene``, and
        ``alterations``), worded as the caption of the same draw.
        """
        forms = self.examples[index].captions
        said = forms[int(draw.integers(len(forms)))]
        scene, others = self.spec(index), tuple[Scene, ...]()
        if "two" in self.contrary_scenes:
            others += contraries(scene)
        if "one" in self.contrary_scenes:
            others += alterations(scene)
        if not others:
            return None
        return wordings(others[int(draw.integers(len(others)))])[wordings(scene).index(said)]

    def load(self, index: int) -> Image.Image:
        """RGB picture, ``size`` high and ``width`` wide."""
        return render(self.spec(index), self.size, self.width)

    def digest(self, index: int) -> str:
        """SHA-256 of the scene, the renderer's version, the size and, of wide ones, the width."""
        record = {"scene": asdict(self.spec(index)), "renderer": RENDERER, "size": self.size}
        if self.width is not None:
            record["width"] = self.width
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


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


def _one(draws: _Draws, background: Background, pair: tuple[Colour, Shape]) -> Scene:
    size = draws.choose(get_args(Size))
    position = draws.choose((*("in the centre",) * 4, *get_args(Position)))
    x, y = (
        along + draws.between(-POSITION_JITTER, POSITION_JITTER) for along in middle(position, size)
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
    free = 1 - 2 * (low + high) - 3 * MARGIN
    cuts = sorted((draws.between(0, free), draws.between(0, free)))
    along = [MARGIN + cuts[0] + low, 1 - MARGIN - (free - cuts[1]) - high]
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
