"""Reads a ``shapes`` picture back: what a drawn picture shows, against what its caption says.

    seen = read(picture),   verdict = compare(seen, scene)

Analysis by synthesis: the background is the colour of the border, every connected patch that is not
background is a thing, its colour that of its core, and its shape and size are those of the
template (``ldm.demo.scene.outlines``) that covers the same pixels. Nothing is learnt, so the
checker cannot have been trained on what it judges.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ldm.demo.scene import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    Background,
    Position,
    Relation,
    Scene,
    Shape,
    Size,
    Thing,
    contrasting,
    middle,
    render,
)

Array = NDArray[np.float64]

_SEEN = 0.35  # share of a colour's distance from the background at which a pixel belongs to a thing
_DUST = 0.25  # of the smallest thing's area: less is no thing


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Args:
        background: nearest of the named ones.
        things: every patch that is not background, as the thing it looks most like.
        misfit: of each thing, the share of its area that its best template gets wrong.
    """

    background: Background
    things: tuple[Thing, ...]
    misfit: tuple[float, ...]


class Verdict(NamedTuple):
    """What of a scene a picture shows.

    Args:
        background: its colour is right.
        count: there are as many things as there should be.
        colours, shapes, sizes: how many things have theirs, under the pairing of things that fits
            best.
        things: how many there should be.
        binding: every thing has its own colour and shape at once.
        position: the only thing lies where the caption says; None where it does not say.
        relation: the two things lie to each other as the caption says; None where it does not say.
    """

    background: bool
    count: bool
    colours: int
    shapes: int
    sizes: int
    things: int
    binding: bool
    position: bool | None
    relation: bool | None

    @property
    def whole(self) -> bool:
        """Whether everything is as the caption says."""
        full = self.colours == self.shapes == self.sizes == self.things
        placed = self.position is not False and self.relation is not False
        return self.background and self.count and full and placed


def read(picture: Image.Image) -> Seen:
    """What ``picture`` (square, RGB, any side of at least 32 pixels) shows."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    side = len(pixels)
    ground = _ground(pixels)
    background = _nearest(ground, BACKGROUNDS)
    away = np.linalg.norm(pixels - ground, axis=-1)
    # No thing's colour is nearer to its background than 60; noise of a decoder is far below.
    patches, count = ndimage.label(away > 60 * _SEEN, np.ones((3, 3)))
    least = _DUST * np.pi * (RADII["small"] * side) ** 2
    things, misfits = [], []
    for number in range(1, count + 1):
        patch = patches == number
        # A dark thing's pale rim is far from the background too: each patch by its own distance.
        own = patch & (away > _SEEN * np.quantile(away[patch], 0.9))
        for piece, pieces in [ndimage.label(own, np.ones((3, 3)))]:
            for k in range(1, pieces + 1):
                mask = piece == k
                if mask.sum() >= least:
                    thing, misfit = _thing(pixels, mask, ground, background)
                    things.append(thing)
                    misfits.append(misfit)
    order = sorted(range(len(things)), key=lambda n: (things[n].y, things[n].x))
    return Seen(background, tuple(things[n] for n in order), tuple(misfits[n] for n in order))


def background_of(picture: Image.Image) -> Background:
    """The named background that the border of ``picture`` is nearest to."""
    return _nearest(_ground(np.asarray(picture.convert("RGB"), np.float64)), BACKGROUNDS)


def _ground(pixels: Array) -> Array:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def _nearest(rgb: Array, named: Any) -> Any:
    return min(named, key=lambda name: math.dist(rgb, named[name]))


def _thing(
    pixels: Array, mask: NDArray[np.bool_], ground: Array, background: Background
) -> tuple[Thing, float]:
    side = len(pixels)
    away = np.linalg.norm(pixels - ground, axis=-1)
    inner = mask & (away >= np.quantile(away[mask], 0.5))
    ink = np.median(pixels[inner], axis=0)
    colour = _nearest(ink, {name: COLOURS[name] for name in contrasting(background)})
    # How much of each pixel is covered: the projection on the line from background to ink.
    line = ink - ground
    cover = np.clip((pixels - ground) @ line / (line @ line), 0, 1)
    cover[~ndimage.binary_dilation(mask, iterations=2)] = 0
    rows, columns = np.nonzero(mask)
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    best: tuple[float, Shape, Size, float, float] | None = None
    area = cover.sum()
    for shape, size in itertools.product(get_args(Shape), get_args(Size)):
        if not 0.5 < _stamp(shape, size, side, 0, 0).sum() / area < 2:
            continue
        for dx, dy in itertools.product((-1, -0.5, 0, 0.5, 1), repeat=2):
            stamp = _placed(shape, size, side, x + dx, y + dy)
            wrong = float(np.abs(stamp - cover).sum() / stamp.sum())
            if best is None or wrong < best[0]:
                best = wrong, shape, size, x + dx, y + dy
    if best is None:  # far larger or smaller than anything that is drawn
        sizes = {size: RADII[size] * side for size in get_args(Size)}
        extent = (np.ptp(columns) + np.ptp(rows)) / 4
        size = min(sizes, key=lambda s: abs(sizes[s] - extent))
        return Thing(colour, "circle", size, float(x / side), float(y / side)), 1.0
    wrong, shape, size, x, y = best
    return Thing(colour, shape, size, float(x / side), float(y / side)), wrong


@cache
def _stamp(shape: Shape, size: Size, side: int, x: int, y: int) -> Array:
    """How much of each pixel, ``side side`` in [0, 1], ``shape`` covers; its middle lies ``x`` and
    ``y`` half pixels behind that of the picture.
    """
    thing = Thing("black", shape, size, 0.5 + 0.5 * x / side, 0.5 + 0.5 * y / side)
    white, black = BACKGROUNDS["white"][0], COLOURS["black"][0]
    drawn = np.asarray(render(Scene("white", (thing,)), side), np.float64)[..., 0]
    return (white - drawn) / (white - black)


def _placed(shape: Shape, size: Size, side: int, x: float, y: float) -> Array:
    """The same with its middle at (x, y), whole or half pixels."""
    (whole_x, half_x), (whole_y, half_y) = (divmod(round(2 * place) - side, 2) for place in (x, y))
    stamp = _stamp(shape, size, side, half_x, half_y)
    moved = np.zeros_like(stamp)
    (from_y, to_y), (from_x, to_x) = (_overlap(n, side) for n in (whole_y, whole_x))
    moved[to_y, to_x] = stamp[from_y, from_x]
    return moved


def _overlap(by: int, side: int) -> tuple[slice, slice]:
    """Where what stays in a row of ``side`` comes from, and where it goes, if all moves ``by``."""
    return slice(max(0, -by), side - max(0, by)), slice(max(0, by), side - max(0, -by))


def compare(seen: Seen, scene: Scene) -> Verdict:
    """Which parts of ``scene`` the picture that was read shows."""
    asked = scene.things
    best = max(_pairings(seen.things, asked), key=lambda pairs: _likeness(pairs))
    found = [(thing, want) for thing, want in best if thing is not None]
    count = len(seen.things) == len(asked)
    bound = len(found) == len(asked) and all(t.pair == w.pair for t, w in found)
    position = relation = None
    if scene.position is not None:
        position = bool(found) and position_of(found[0][0], asked[0].size) == scene.position
    if scene.relation is not None:
        relation = len(found) == 2 and relation_of(found[0][0], found[1][0]) == scene.relation
    return Verdict(
        background=seen.background == scene.background,
        count=count,
        colours=sum(t.colour == w.colour for t, w in found),
        shapes=sum(t.shape == w.shape for t, w in found),
        sizes=sum(t.size == w.size for t, w in found),
        things=len(asked),
        binding=bound,
        position=position,
        relation=relation,
    )


_Pairs = list[tuple[Thing | None, Thing]]


def _pairings(seen: tuple[Thing, ...], asked: tuple[Thing, ...]) -> list[_Pairs]:
    """Every way to tell which of up to five things is which; the rest of many is left out."""
    # The largest: what was asked for before crumbs.
    largest = sorted(seen, key=lambda thing: -thing.radius)[:6]
    padded = [*largest, *[None] * (len(asked) - len(largest))]
    if all(want.pair == asked[0].pair and want.size == asked[0].size for want in asked):
        ranked = sorted(padded, key=lambda t: -1 if t is None else -_alike(t, asked[0]))
        ranked = [t for t in ranked if t is not None] + [t for t in ranked if t is None]
        return [list(zip(ranked[: len(asked)], asked, strict=True))]
    orders = itertools.permutations(padded, len(asked))
    return [list(zip(order, asked, strict=True)) for order in orders]


def _alike(thing: Thing, want: Thing) -> int:
    return (
        4 * (thing.colour == want.colour)
        + 4 * (thing.shape == want.shape)
        + (thing.size == want.size)
    )


def _likeness(pairs: _Pairs) -> float:
    """How much of what was asked is there; where that is equal, how near it lies."""
    total = 0.0
    for thing, want in pairs:
        if thing is not None:
            total += 1 + _alike(thing, want) - math.dist((thing.x, thing.y), (want.x, want.y)) / 10
    return total


def position_of(thing: Thing, size: Size) -> Position:
    """The named place that ``thing`` lies nearest to, of those for things of ``size``."""
    return min(
        get_args(Position), key=lambda name: math.dist((thing.x, thing.y), middle(name, size))
    )


def relation_of(first: Thing, second: Thing) -> Relation:
    """How ``first`` lies to ``second``, along the axis on which they are further apart."""
    x, y = first.x - second.x, first.y - second.y
    if abs(x) >= abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"
