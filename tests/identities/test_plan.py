"""Buckets, proportions and permutations: what each image of a run is, and how evenly."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from ldm.data.buckets import Buckets, table
from ldm.data.collection import Collection
from ldm.data.images import ImageTransform, View, coordinates
from ldm.data.order import Schedule
from ldm.data.plan import Plan
from ldm.data.source import Drawn, Example
from ldm.errors import DataError

# -- proportions --


@pytest.mark.parametrize(
    "shares", [[1], [3, 1], [5, 3, 2], [1, 1, 1, 1], [1000, 1], [17, 4, 9, 100]]
)
def test_a_period_meets_its_shares_exactly(shares):
    schedule = Schedule(shares)
    period = sum(shares) // np.gcd.reduce(shares)
    for start in (0, period, 5 * period):
        counts = Counter(schedule[turn][0] for turn in range(start, start + period))
        assert [counts[g] * np.gcd.reduce(shares) for g in range(len(shares))] == shares


@pytest.mark.parametrize("shares", [[5, 3, 2], [0.7, 0.2, 0.1], [3e6, 1e6, 7]])
def test_counts_before_are_those_of_going_through(shares):
    schedule, seen = Schedule(shares), Counter()
    for turn in range(3000):
        group, before = schedule[turn]
        assert before == seen[group]
        seen[group] += 1


def test_every_stretch_has_its_share():
    """No group waits: after any number of turns each is within two of its share."""
    shares = [0.5, 0.3, 0.15, 0.05]
    schedule, counts = Schedule(shares), np.zeros(4)
    for turn in range(5000):
        counts[schedule[turn][0]] += 1
        assert np.abs(counts - np.array(shares) * (turn + 1)).max() < 2.5


def test_shares_that_are_none():
    for shares in ([], [1, 0], [-1, 2]):
        with pytest.raises(ValueError, match="shares must be positive"):
            Schedule(shares)


# -- buckets --


def test_shapes_fill_the_area_and_are_symmetric():
    buckets = Buckets(step=64, max_aspect=2)
    shapes = buckets.shapes(512)
    assert (512, 512) in shapes
    assert {(h, w) for w, h in shapes} == set(shapes)
    for width, height in shapes:
        assert width % 64 == height % 64 == 0
        assert 0.75 * 512**2 < width * height <= 512**2
        assert max(width, height) <= 2 * min(width, height)
    ratios = [width / height for width, height in shapes]
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)


def test_a_picture_goes_to_the_nearest_ratio():
    buckets = Buckets(step=8, upscale=True)
    shapes = np.array(buckets.shapes(64))
    sizes = np.random.default_rng(0).integers(20, 2000, (500, 2))
    found = buckets.assign(sizes, 64)
    distance = np.abs(np.log(shapes[:, 0] / shapes[:, 1]) - np.log(sizes[:, :1] / sizes[:, 1:]))
    assert np.array_equal(found, shapes[distance.argmin(1)])


def test_nothing_is_enlarged_unless_asked():
    sizes = np.random.default_rng(1).integers(4, 200, (2000, 2))
    plain, enlarged = Buckets(step=8), Buckets(step=8, upscale=True)
    found = plain.assign(sizes, 64)
    assert (found <= sizes).all()
    assert (found % 8 == 0).all()
    small = sizes.min(1) < 8
    assert ((found == 0).any(1) == small).all() and 0 < small.sum() < 200
    assert (enlarged.assign(sizes, 64) > 0).all()
    # Large pictures have the same bucket either way.
    large = (sizes >= 96).all(1)
    assert np.array_equal(found[large], enlarged.assign(sizes, 64)[large])


def test_no_bucket_is_flat_or_longer_than_the_limit():
    sizes = np.random.default_rng(2).integers(1, 900, (3000, 2))
    sizes = np.concatenate([sizes, [[1, 1], [1, 30000], [30000, 1], [600, 80], [240, 60]]])
    for buckets in (Buckets(step=64), Buckets(step=8, max_aspect=3.5), Buckets(max_aspect=1)):
        found = buckets.assign(sizes, 512)
        small = sizes.min(1) < buckets.step
        assert ((found > 0).all(1) == ~small).all() and (found[small] == 0).all()
        assert (found.max(1) <= buckets.max_aspect * found.min(1)).all()
        assert table(found).count("too small") == 1
    assert Buckets(step=64).assign(np.array([[600, 80]]), 512).tolist() == [[128, 64]]


def test_table_counts():
    text = table(np.array([[64, 64], [64, 64], [96, 40], [0, 0]]))
    assert "64x64    1.00         2" in text
    assert "96x40    2.40         1" in text
    assert "too small                 1" in text


def test_impossible_buckets():
    for options, word in (({"step": 0}, "step=0"), ({"max_aspect": 0.5}, "max_aspect=0.5")):
        with pytest.raises(ValueError, match=word):
            Buckets(**options)
    with pytest.raises(ValueError, match="images.size 32 is smaller than a step"):
        ImageTransform(size=32, buckets=Buckets(step=64))


# -- cutting and what is told about it --


def test_coordinates_of_a_wide_picture():
    # 300x100 onto 64x64: the middle 100x100 of it, scaled by 0.64.
    assert coordinates((300, 100), View(), (64, 64)) == (100, 300, 0, 64, 64, 64)
    assert coordinates((300, 100), View(place=0.0), (64, 64)) == (100, 300, 0, 0, 64, 64)
    # Mirrored, what lies on the left of the result was cut off on the right.
    mirrored = View(place=0.25, mirrored=True)
    assert coordinates((300, 100), mirrored, (64, 64)) == (100, 300, 0, 96, 64, 64)
    assert coordinates((100, 300), View(place=1.0), (64, 64)) == (300, 100, 128, 0, 64, 64)
    assert coordinates((64, 96), View(), (64, 96)) == (96, 64, 0, 0, 96, 64)


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_a_cut_keeps_proportions_and_covers(shape):
    """A picture whose colours are its coordinates tells where each pixel of the result was."""
    y, x = np.mgrid[0:120, 0:200].astype(np.float32)
    ramp = np.stack([x / 199 * 255, y / 119 * 255, 0 * x], -1).round().astype(np.uint8)
    result = ImageTransform(size=64)(Image.fromarray(ramp), View(), shape).float().numpy()
    assert result.shape == (3, shape[1], shape[0])
    step_x = np.diff(result[0].mean(0)).mean() / 255 * 199
    step_y = np.diff(result[1].mean(1)).mean() / 255 * 119
    assert abs(step_x / step_y - 1) < 0.02  # the same scale both ways
    scale = max(shape[0] / 200, shape[1] / 120)
    assert abs(step_x * scale - 1) < 0.02
    assert abs(result[0].mean() - 127.5) < 2 and abs(result[1].mean() - 127.5) < 2


# -- plans --


@dataclass
class Sized(Drawn):
    """Pictures of given sizes that are not looked at."""

    all_sizes: list[tuple[int, int]]
    weight: float | None = None
    kind: str = "sized"
    examples: list[Example] = field(init=False)

    def __post_init__(self):
        self.examples = [
            Example(str(i), (f"caption {i}",), False) for i in range(len(self.all_sizes))
        ]

    @property
    def sizes(self):
        return np.array(self.all_sizes, np.int32).reshape(-1, 2)


MIXED = [(100 + i, 100) for i in range(37)] + [(100, 180 + i) for i in range(11)] + [(300, 150)] * 5
BUCKETS = ImageTransform(size=64, buckets=Buckets(step=16))


def test_batches_have_one_shape_and_use_is_equal():
    items = Collection(Sized(MIXED), BUCKETS).train
    plan = Plan(items, batch=8, seed=0)
    uses, batches = Counter(), Counter()
    for batch in range(600):
        drawn = [plan[batch * 8 + i] for i in range(8)]
        assert len({item.shape for item in drawn}) == 1
        batches[drawn[0].shape] += 1
        uses.update(item.index for item in drawn)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number in range(len(items)):
        item = items[number]
        by_shape.setdefault(item.shape, []).append(uses[item.index])
    assert len(by_shape) > 2
    for shape, counts in by_shape.items():
        assert max(counts) - min(counts) <= 1, shape
        assert abs(batches[shape] - 600 * len(counts) / len(items)) <= 2
    # Over the buckets as well: every picture 600 * 8 / 53 times, but for the last turns.
    assert max(uses.values()) - min(uses.values()) <= 4


def test_any_position_without_those_before():
    items = Collection(Sized(MIXED), BUCKETS).train
    whole = [Plan(items, 8, seed=5)[n].index for n in range(2000)]
    plan = Plan(items, 8, seed=5)
    for n in (1999, 3, 1024, 777):
        assert plan[n].index == whole[n]
    assert [Plan(items, 8, seed=6)[n].index for n in range(200)] != whole[:200]


@pytest.mark.parametrize("transform", [ImageTransform(size=64), BUCKETS])
def test_weights_are_met_whatever_the_sizes(transform):
    sources = [Sized([(80, 80)] * 10, weight=3), Sized([(90, 90)] * 1000, weight=1)]
    plan = Plan(Collection(sources, transform).train, batch=8, seed=0)
    drawn = [plan[n] for n in range(8000)]
    share = np.mean([item.source is sources[0] for item in drawn])
    assert abs(share - 0.75) < 0.001
    uses = Counter(item.index for item in drawn if item.source is sources[0])
    assert max(uses.values()) - min(uses.values()) <= 1
    rare = Counter(item.index for item in drawn if item.source is sources[1])
    assert len(rare) == 1000 and max(rare.values()) - min(rare.values()) <= 1


def test_a_source_without_a_weight_weighs_its_pictures():
    sources = [Sized([(80, 80)] * 300), Sized([(80, 80)] * 5, weight=100)]
    plan = Plan(Collection(sources, ImageTransform()).train, batch=8, seed=0)
    share = np.mean([plan[n].source is sources[0] for n in range(8000)])
    assert abs(share - 0.75) < 0.001


def test_a_weight_of_zero_is_never_drawn():
    sources = [Sized([(80, 80)] * 3), Sized([(80, 80)] * 5, weight=0)]
    plan = Plan(Collection(sources, ImageTransform()).train, batch=4, seed=0)
    assert {id(plan[n].source) for n in range(100)} == {id(sources[0])}


def test_too_small_pictures_are_told_or_skipped():
    source = Sized([(100, 100), (10, 100), (100, 9)])
    with pytest.raises(
        DataError, match="sized: 2 pictures smaller than a step of the buckets: 1, 2"
    ):
        Collection(source, BUCKETS)
    skipping = Collection(source, BUCKETS, "skip")
    assert [item.index for item in skipping.train] == [0]
    assert [problem.key for _, problem in skipping.skipped] == ["1", "2"]
