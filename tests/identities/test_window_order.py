"""An order over shards: still endless permutations by position alone, few shards at a time."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from ldm.data import order
from ldm.data.buckets import Buckets
from ldm.data.collection import Collection
from ldm.data.images import ImageTransform
from ldm.data.order import WindowOrder, positions
from ldm.data.plan import Plan
from ldm.data.source import Drawn, Example


def shards_of(lengths) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def windowed(lengths, window: int, batch: int = 8, seed: int = 0) -> WindowOrder:
    shards = shards_of(lengths)
    return WindowOrder(shards, np.arange(len(lengths)), window=window, batch=batch, seed=seed)


UNEVEN = [7, 1, 0, 12, 5, 30, 3, 3, 9, 20]


@pytest.mark.parametrize(
    ("lengths", "window", "batch"),
    [
        ([5], 1, 4),
        ([1] * 9, 2, 4),
        (UNEVEN, 3, 8),
        (UNEVEN, 1, 16),
        (UNEVEN, 50, 7),
        ([2, 3], 1, 1),
    ],
)
def test_use_counts_differ_by_at_most_one_at_any_moment(lengths, window, batch):
    total = sum(lengths)
    sequence = windowed(lengths, window, batch)
    counts = np.zeros(total, int)
    for position in range(4 * total + total // 2):
        counts[sequence[position]] += 1
        assert counts.max() - counts.min() <= 1
    assert counts.min() == 4


def test_epochs_and_seeds_differ():
    total = sum(UNEVEN)
    drawn = {
        tuple(windowed(UNEVEN, 3, seed=seed)[epoch * total + n] for n in range(total))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(drawn) == 9


def test_any_position_costs_two_small_permutations(monkeypatch):
    """In the middle of a shard of a far epoch nothing that came before is gone through."""
    sizes = []

    class Counted:
        def __init__(self, draw):
            self.draw = draw

        def permutation(self, n):
            sizes.append(n)
            return self.draw.permutation(n)

    plain = order.stream
    monkeypatch.setattr(order, "stream", lambda *key: Counted(plain(*key)))
    lengths = [1000] * 500
    sequence = windowed(lengths, 4)
    far = 10**9 * 500_000 + 123_456
    found = sequence[far]
    assert sizes == [500, 1000, 1000, 1000, 1000]
    assert [sequence[far + n] for n in range(1000)] and len(sizes) <= 10
    fresh = windowed(lengths, 4)
    assert fresh[far + 7] == sequence[far + 7] and fresh[far] == found


def test_a_window_is_mixed():
    """A batch has pictures of every shard of its window, and they do not come in their order."""
    sequence = windowed([100] * 12, 4, batch=16)
    for step in range(25):
        drawn = [sequence[step * 16 + n] for n in range(16)]
        assert len({row // 100 for row in drawn}) == 4
    assert {row // 100 for row in (sequence[n] for n in range(400))} == {
        row // 100 for row in drawn
    }
    first = [sequence[step * 16] for step in range(25)]
    assert first != sorted(first) and len({row // 100 for row in first}) == 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_a_rank_touches_its_part_of_a_window(world, micro):
    """The same draws at any world size, each rank in about 1 / world of the shards."""
    lengths, window, batch = [40 + n % 7 for n in range(64)], 8, 16
    shards = shards_of(lengths)
    sequence = windowed(lengths, window, batch)
    stop = 40 * batch  # two windows of some 340 pictures: one end of a window is in every stretch
    touched = []
    for rank in range(world):
        mine = [
            sequence[position]
            for part in positions(
                0, batch=batch, micro=micro or batch // world, rank=rank, world=world, stop=stop
            )
            for position in part
        ]
        # In every stretch of a window's length: the rest of one window and the first of the next.
        per_window = sum(lengths) // (len(lengths) // window)
        span = per_window // world
        most = max(
            len({int(shards[row]) for row in mine[at : at + span]})
            for at in range(0, len(mine) - span, 5)
        )
        assert most <= 2 * (window // world + 1)
        within = {int(shards[row]) for row in mine[: 20 * batch // world]}
        assert len(within) <= window // world + 1
        touched.append(within)
    assert len(set.union(*touched)) == window  # all ranks together: the shards of one window


# -- in a plan: buckets, weights, several sources --


@dataclass
class Sharded(Drawn):
    """Pictures of given sizes in shards of ten."""

    all_sizes: list[tuple[int, int]]
    weight: float | None = None
    kind: str = "sharded"
    examples: list[Example] = field(init=False)

    def __post_init__(self):
        self.examples = [
            Example(str(i), (f"caption {i}",), False) for i in range(len(self.all_sizes))
        ]
        self.shards = np.arange(len(self.all_sizes)) // 10

    @property
    def sizes(self):
        return np.array(self.all_sizes, np.int32).reshape(-1, 2)


SIZES = [(100 + i % 5, 100) if i % 3 else (100, 180 + i % 7) for i in range(600)]
BUCKETS = ImageTransform(size=64, buckets=Buckets(step=16))


def test_buckets_keep_their_permutations_and_share_the_shards():
    items = Collection(Sharded(SIZES), BUCKETS).train
    plan = Plan(items, batch=8, seed=0, window=4)
    uses: dict[tuple[int, int], Counter[int]] = {}
    recent: list[int] = []
    for batch in range(300):
        drawn = [plan[batch * 8 + i] for i in range(8)]
        (shape,) = {item.shape for item in drawn}
        uses.setdefault(shape, Counter()).update(item.index for item in drawn)
        recent = [*recent, *(item.index // 10 for item in drawn)][-32:]
        assert len(set(recent)) <= 12  # of 60: a window, and at its end those of the next
    assert len(uses) == 2
    for shape, counts in uses.items():
        everyone = [item.index for item in items if item.shape == shape]
        found = [counts[index] for index in everyone]
        assert max(found) - min(found) <= 1 and sum(found) == sum(counts.values())
    again = Plan(items, batch=8, seed=0, window=4)
    for n in (2399, 3, 1024, 777):
        assert again[n].index == plan[n].index
    assert [Plan(items, 8, 0)[n].index for n in range(64)] != [plan[n].index for n in range(64)]


@pytest.mark.parametrize("transform", [ImageTransform(size=64), BUCKETS])
def test_weights_are_met(transform):
    sources = [Sharded([(80, 80)] * 35, weight=3), Sharded([(90, 90)] * 1000, weight=1)]
    plan = Plan(Collection(sources, transform).train, batch=8, seed=0, window=2)
    drawn = [plan[n] for n in range(8000)]
    assert abs(np.mean([item.source is sources[0] for item in drawn]) - 0.75) < 0.001
    for source in sources:
        counts = Counter(item.index for item in drawn if item.source is source)
        assert len(counts) == len(source.examples)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_sources_without_shards_are_one(caplog):
    apart = Sharded([(80, 80)] * 30)
    apart.shards = None
    items = Collection([apart, Sharded([(80, 80)] * 25)], ImageTransform()).train
    assert items.shards().tolist() == [0] * 30 + [1] * 10 + [2] * 10 + [3] * 5
    plan = Plan(items, 5, 0, window=1)
    counts = Counter(
        (item.source.shards is None, item.index) for item in map(plan.__getitem__, range(55))
    )
    assert set(counts.values()) == {1} and len(counts) == 55 and not caplog.text
    Plan(Collection(apart, ImageTransform()).train, 5, 0, window=1)
    assert "order.window changes nothing" in caplog.text
