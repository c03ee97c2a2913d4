"""Captions say what is drawn, it is drawn where the scene says, held-out pairs stay held out."""

import math
import re
import time
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from ldm.demo.scene import (
    BACKGROUNDS,
    COLOURS,
    Background,
    Scene,
    Shape,
    Size,
    Thing,
    captions,
    contrasting,
    is_held_out,
    outlines,
    render,
)
from ldm.demo.shapes import ShapesData
from ldm.errors import DataError

DATA = ShapesData(count=3000)
SCENES = [DATA.spec(index) for index in range(DATA.count)]
PAIRS = [(c, s) for c in COLOURS for s in get_args(Shape) if is_held_out(c, s)]
NUMBERS = ["no", "one", "two", "three", "four", "five"]


def test_held_out_pairs() -> None:
    assert len(PAIRS) == 10
    assert max(Counter(c for c, _ in PAIRS).values()) <= 3
    assert max(Counter(s for _, s in PAIRS).values()) <= 3


def test_no_training_picture_has_a_held_out_pair() -> None:
    held = 0
    for example, scene in zip(DATA.examples, SCENES, strict=True):
        with_pair = any(thing.pair in PAIRS for thing in scene.things)
        assert example.held_out == with_pair
        # The text alone must not give one away either.
        said = {(c, s) for c, s in PAIRS for text in example.captions if f"{c} {s}" in text}
        assert bool(said) == with_pair
        held += with_pair
    assert 0.04 < held / DATA.count < 0.06


def test_without_hold_out_the_pictures_are_the_same() -> None:
    free = ShapesData(count=300, hold_out=False)
    assert not any(example.held_out for example in free.examples)
    assert [e.captions for e in free.examples] == [e.captions for e in DATA.examples[:300]]
    assert [free.spec(i) for i in range(300)] == SCENES[:300]


THING = re.compile(
    rf"(an?|\w+) (?:({'|'.join(get_args(Size))}) )?({'|'.join(COLOURS)}) "
    rf"({'|'.join(get_args(Shape))})(?:e?s)?\b"
)
GROUND = re.compile(rf"({'|'.join(get_args(Background))}) background")
RELATION = re.compile(r"\b(left of|right of|above|below)\b")
PLACE = re.compile(
    r"\b(at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the centre)\b"
)
FIRST = {"on the left": "left of", "at the top": "above"}
LAST = {"on the right": "right of", "at the bottom": "below"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def read(caption: str) -> tuple[object, ...]:
    """What a caption says, with the defaults for what it leaves out."""
    ground = GROUND.search(caption)
    relation = RELATION.search(caption)
    place = PLACE.search(caption)
    things = [(m[1], m[2] or "medium", m[3], m[4]) for m in THING.finditer(GROUND.sub("", caption))]
    word = things[0][0]
    number = int(word) if word.isdecimal() else NUMBERS.index(word) if word in NUMBERS else 1
    kinds = tuple(thing[1:] for thing in things)
    how = relation[1] if relation else None
    if how in ("right of", "below"):
        how, kinds = OPPOSITE[how], kinds[::-1]
    where = None if relation or number > 1 else place[1] if place else "in the centre"
    if len(things) == 2 and not relation:
        first, second = PLACE.findall(caption)
        how, where = FIRST[first], None
        assert FIRST[first] == OPPOSITE[LAST[second]]
    return ground[1] if ground else "white", kinds, number, how, where


def said(scene: Scene) -> tuple[object, ...]:
    kinds = [(thing.size, thing.colour, thing.shape) for thing in scene.things]
    relation = scene.relation
    if relation is None:
        return scene.background, (kinds[0],), len(kinds), None, scene.position
    if relation in ("right of", "below"):
        relation, kinds = OPPOSITE[relation], kinds[::-1]
    return scene.background, tuple(kinds), 1, relation, None


def test_every_caption_states_the_whole_scene() -> None:
    for scene in SCENES:
        for caption in captions(scene):
            assert read(caption) == said(scene), caption


def test_the_first_caption_names_everything() -> None:
    for example, scene in zip(DATA.examples, SCENES, strict=True):
        first = example.captions[0]
        assert f"{scene.background} background" in first
        for thing in scene.things:
            assert f"{thing.size} {thing.colour} {thing.shape}" in first
        assert scene.position is None or scene.position in first
        assert scene.relation is None or scene.relation in first
        assert scene.position or scene.relation or NUMBERS[len(scene.things)] in first
        assert len(example.captions) == len(set(example.captions)) >= 3


def test_the_left_or_upper_thing_is_named_first_in_more_than_two_thirds() -> None:
    firsts, texts = 0, 0
    for scene in SCENES:
        for caption in captions(scene) if scene.relation else ():
            forwards = re.search(r"left of|above| and ", caption)
            firsts, texts = firsts + bool(forwards), texts + 1
    assert texts > 5000 and 0.67 < firsts / texts < 0.75
    # What is measured asks for both alike.
    asked = [captions(scene)[0] for scene in SCENES if scene.relation]
    backwards = sum(bool(re.search(r"right of|below", text)) for text in asked)
    assert 0.45 < backwards / len(asked) < 0.55


def test_captions_read_well() -> None:
    thing = Thing("orange", "cross", "medium", 0.5, 0.5)
    assert captions(Scene("white", (thing,), position="in the centre")) == (
        "a medium orange cross in the centre on a white background",
        "an orange cross",
        "one orange cross",
        "a white background with an orange cross in the centre",
        "a medium orange cross, white background",
    )
    assert captions(Scene("mint", (thing,) * 3))[:3] == (
        "three medium orange crosses on a mint background",
        "three orange crosses on a mint background",
        "3 orange crosses on a mint background",
    )
    star = Thing("green", "star", "small", 0.2, 0.5)
    assert captions(Scene("white", (star, thing), relation="left of")) == (
        "a small green star to the left of a medium orange cross on a white background",
        "a medium orange cross to the right of a small green star on a white background",
        "a small green star left of an orange cross",
        "an orange cross right of a small green star",
        "a white background with a small green star left of an orange cross",
        "a small green star on the left and a medium orange cross on the right"
        " on a white background",
        "a small green star on the left and an orange cross on the right",
    )


def test_everything_is_drawn_about_equally_often() -> None:
    things = Counter(t.pair for s in SCENES for t in s.things[: 2 if s.relation else 1])
    assert set(things) == {(c, s) for c in COLOURS for s in get_args(Shape)}
    free = [n for pair, n in things.items() if pair not in PAIRS and pair[0] != "black"]
    assert min(free) > 0.4 * np.mean(free)
    assert {s.background for s in SCENES} == set(get_args(Background))
    kinds = Counter("two" if s.relation else "one" if s.position else "many" for s in SCENES)
    assert min(kinds.values()) > 900
    assert {len(s.things) for s in SCENES} == {1, 2, 3, 4, 5}
    assert len({s.position for s in SCENES}) == 10 and len({s.relation for s in SCENES}) == 5


def test_things_fit_do_not_touch_and_stand_as_related() -> None:
    for scene in SCENES:
        for thing in scene.things:
            for centre in (thing.x, thing.y):
                assert 0.02 < centre - thing.radius and centre + thing.radius < 0.98
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                apart = max(abs(a.x - b.x), abs(a.y - b.y)), math.hypot(a.x - b.x, a.y - b.y)
                reach = a.radius + b.radius
                # Boxes apart, or (five in a quincunx) so far apart that no two shapes can meet.
                assert apart[0] > reach + 0.01 or apart[1] > 1.3 * reach
        if scene.relation:
            a, b = scene.things
            along = a.x - b.x if scene.relation in ("left of", "right of") else a.y - b.y
            across = a.y - b.y if scene.relation in ("left of", "right of") else a.x - b.x
            assert (along < 0) == (scene.relation in ("left of", "above"))
            assert abs(along) > 2 * abs(across)
        if scene.position:
            (thing,) = scene.things
            words = scene.position.split()
            for near, far, along in (("left", "right", thing.x), ("top", "bottom", thing.y)):
                side = near if along < 0.43 else far if along > 0.57 else None
                assert {near, far} & set(words) == ({side} if side else set())


def inside(x: np.ndarray, y: np.ndarray, polygon: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Even-odd rule, written apart from the renderer."""
    result = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            result ^= crosses & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return result


@pytest.mark.parametrize("size", [64, 48])
def test_colours_are_where_the_scene_says(size: int) -> None:
    """Every pixel of every picture against the exact coverage of its area."""
    fine = 8
    centres = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = np.meshgrid(centres, centres)
    for scene in SCENES[:30]:
        ideal = np.empty((size * fine, size * fine, 3))
        ideal[:] = BACKGROUNDS[scene.background]
        for thing in scene.things:
            outer, *holes = outlines(thing.shape)
            at = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
            mask = inside(*at, outer)
            for hole in holes:
                mask &= ~inside(*at, hole)
            ideal[mask] = COLOURS[thing.colour]
        ideal = ideal.reshape(size, fine, size, fine, 3).mean((1, 3))
        drawn = np.asarray(render(scene, size), np.float64)
        assert drawn.shape == (size, size, 3)
        difference = np.abs(drawn - ideal).max(-1)
        # Away from the edges the colours are exact.
        palette = [BACKGROUNDS[scene.background], *{COLOURS[t.colour] for t in scene.things}]
        pure = np.stack([(ideal == rgb).all(-1) for rgb in palette])
        windows = np.lib.stride_tricks.sliding_window_view(pure, (3, 3), axis=(1, 2))
        flat = windows.all((3, 4)).any(0)
        assert difference[1:-1, 1:-1][flat].max() == 0
        assert flat.mean() > 0.45
        # An edge may be off by an oversampled pixel: an eighth of 255, at corners twice that.
        assert difference.max() < 64
        assert difference[~pure.any(0)].mean() < 30


def test_colours_are_far_apart() -> None:
    def closest(a: dict, b: dict) -> float:
        return min(math.dist(p, q) for m, p in a.items() for n, q in b.items() if m != n)

    assert closest(COLOURS, COLOURS) > 80
    assert closest(BACKGROUNDS, BACKGROUNDS) > 50
    assert closest(COLOURS, BACKGROUNDS) > 100
    assert contrasting("white") == tuple(COLOURS)
    assert "black" not in contrasting("black") and len(contrasting("black")) == 9


def test_shapes_differ() -> None:
    """At the smallest size the pictures of no two shapes agree."""
    drawn = {
        s: np.asarray(render(Scene("white", (Thing("black", s, "small", 0.5, 0.5),)), 64), float)
        for s in get_args(Shape)
    }
    closest = min(
        np.abs(a - b).sum() / 255 / 3 for m, a in drawn.items() for n, b in drawn.items() if m < n
    )
    assert closest > 10  # pixels, of about 130
    for shape in get_args(Shape):
        points = np.array(outlines(shape)[0])
        assert np.abs(points).max() <= 1 + 1e-12
        assert np.abs(points.max(0) + points.min(0)).max() < 1e-9


def test_pictures_are_a_function_of_seed_and_index() -> None:
    short = ShapesData(count=10)
    assert [short.spec(i) for i in range(10)] == SCENES[:10]
    assert short.digest(3) == DATA.digest(3)
    digests = {DATA.digest(i) for i in range(1000)}
    assert len(digests) == 1000
    assert ShapesData(count=10, seed=1).spec(0) != SCENES[0]
    assert ShapesData(count=10, size=32).digest(3) != DATA.digest(3)
    assert DATA.load(5).tobytes() == ShapesData(count=10).load(5).tobytes()
    assert DATA.load(5).size == (64, 64)
    # Whoever changes what is drawn from a seed has to know it.
    assert DATA.examples[0].captions[0] == (
        "a large blue square at the top right on a white background"
    )
    assert DATA.digest(0)[:16] == "d2dd1cef85a543ea"


def test_a_wide_picture_has_its_scene_in_the_middle() -> None:
    wide = ShapesData(count=4, width=96)
    assert wide.sizes.tolist() == [[96, 64]] * 4
    assert ShapesData(count=1).sizes.tolist() == [[64, 64]]
    picture = wide.load(3)
    assert picture.crop((16, 0, 80, 64)).tobytes() == DATA.load(3).tobytes()
    for left in (0, 80):
        strip = np.asarray(picture.crop((left, 0, left + 16, 64)))
        assert (strip == BACKGROUNDS[SCENES[3].background]).all()
    assert wide.spec(3) == SCENES[3] and wide.digest(3) != DATA.digest(3)


def test_twenty_thousand_are_listed_quickly() -> None:
    start = time.process_time()
    assert len(ShapesData().examples) == 20000
    assert time.process_time() - start < 4  # 0.6 s on a quiet core


def test_misuse_is_refused() -> None:
    with pytest.raises(IndexError):
        ShapesData(count=3).spec(3)
    with pytest.raises(DataError, match="count=0"):
        ShapesData(count=0)
    with pytest.raises(DataError, match="size=4"):
        ShapesData(size=4)
    with pytest.raises(DataError, match="width=48 leaves no room for a scene of size=64"):
        ShapesData(width=48)
