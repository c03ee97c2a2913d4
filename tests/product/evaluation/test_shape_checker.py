"""The checker of ``shapes`` reads every scene right, and tells every way to be wrong apart."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.demo.checker import compare, read, relation_of
from ldm.demo.scene import Scene, Thing, render
from ldm.demo.shapes import ShapesData

PAIR = Scene(
    "cream",
    (Thing("red", "star", "medium", 0.25, 0.5), Thing("blue", "ring", "small", 0.75, 0.52)),
    relation="left of",
)
ONE = Scene("white", (Thing("green", "hexagon", "large", 0.5, 0.5),), position="in the centre")
MANY = Scene(
    "black", tuple(Thing("pink", "heart", "small", x, y) for x, y in [(0.25, 0.5), (0.75, 0.5)])
)


def judged(drawn: Scene, asked: Scene):
    return compare(read(render(drawn, 64)), asked)


@pytest.mark.parametrize("size, count", [(64, 40), (96, 10)])
def test_truth_is_read_without_a_mistake(size: int, count: int) -> None:
    source = ShapesData(count=count, seed=11, size=size)
    wrong = [n for n in range(count) if not compare(read(source.load(n)), source.spec(n)).whole]
    assert wrong == []


def test_noise_and_blur_do_not_matter() -> None:
    source, noise = ShapesData(count=20, seed=12), np.random.default_rng(0)
    for n in range(20):
        blurred = source.load(n).filter(ImageFilter.GaussianBlur(0.6))
        pixels = np.asarray(blurred, np.float64) + noise.normal(0, 6, (64, 64, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        assert compare(read(picture), source.spec(n)).whole, n


def test_places_are_read_to_a_pixel() -> None:
    (thing,) = read(render(ONE, 64)).things
    assert abs(thing.x - 0.5) < 1 / 64 and abs(thing.y - 0.5) < 1 / 64
    assert read(render(ONE, 64)).misfit[0] < 0.02


def changed(scene: Scene, number: int, **changes) -> Scene:
    things = list(scene.things)
    things[number] = replace(things[number], **changes)
    return replace(scene, things=tuple(things))


def test_each_mistake_is_told_by_its_name() -> None:
    right = judged(PAIR, PAIR)
    assert right.whole and (right.colours, right.shapes, right.sizes, right.things) == (2, 2, 2, 2)
    cases = {
        "background": (replace(PAIR, background="mint"), {"background": False}),
        "colour": (changed(PAIR, 0, colour="green"), {"colours": 1, "binding": False}),
        "shape": (changed(PAIR, 1, shape="circle"), {"shapes": 1, "binding": False}),
        "size": (changed(PAIR, 1, size="medium"), {"sizes": 1}),
        "missing": (
            replace(PAIR, things=PAIR.things[:1], relation=None),
            {"count": False, "colours": 1, "shapes": 1, "sizes": 1, "binding": False,
             "relation": False},
        ),
        "sides": (
            changed(changed(PAIR, 0, x=0.75), 1, x=0.25),
            {"relation": False},
        ),
        "third": (
            replace(PAIR, things=(*PAIR.things, Thing("black", "cross", "small", 0.5, 0.85))),
            {"count": False},
        ),
    }  # fmt: skip
    for name, (drawn, expected) in cases.items():
        verdict = judged(drawn, PAIR)
        assert verdict == right._replace(**expected), name
        assert not verdict.whole


def test_swapped_colours_are_no_binding() -> None:
    swapped = changed(changed(PAIR, 0, colour="blue"), 1, colour="red")
    verdict = judged(swapped, PAIR)
    # Either every colour or every shape can be paired up, never both.
    assert not verdict.binding and 0 in (verdict.colours, verdict.shapes)


def test_one_and_many() -> None:
    assert judged(ONE, ONE).whole
    assert judged(changed(ONE, 0, size="small", x=0.2), ONE).position is False
    assert judged(MANY, MANY).whole
    three = replace(MANY, things=(*MANY.things, Thing("pink", "heart", "small", 0.5, 0.2)))
    verdict = judged(three, MANY)
    assert (verdict.count, verdict.binding, verdict.whole) == (False, True, False)


def test_an_empty_picture_and_one_that_is_full() -> None:
    empty = compare(read(Image.new("RGB", (64, 64), "white")), ONE)
    assert (empty.background, empty.count, empty.colours, empty.position) == (True, False, 0, False)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not compare(read(Image.fromarray(noise)), PAIR).whole


def test_relations_go_by_the_longer_way() -> None:
    here, there = PAIR.things
    assert relation_of(here, there) == "left of" and relation_of(there, here) == "right of"
    up, down = replace(here, x=0.5, y=0.2), replace(there, x=0.55, y=0.8)
    assert relation_of(up, down) == "above" and relation_of(down, up) == "below"
