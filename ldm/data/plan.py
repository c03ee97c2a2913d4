"""Which picture the n-th image of a run is.

    batch of n -> bucket (fixed proportions) -> source (fixed proportions) -> endless permutation

All images of a batch have one shape. Buckets take turns by the number of their pictures, sources by
their weights; within each, pictures come in endless permutations. So any two pictures of a bucket
and source are used equally often (to one use), and all of it is a function of (seed, n).
"""

from __future__ import annotations

import numpy as np

from ldm.data.collection import Item, Items
from ldm.data.order import Order, Schedule


class _Bucket:
    """The pictures of one shape, by source where sources have weights."""

    def __init__(self, members: list[np.ndarray], shares: list[float], seed: int, name: str):
        self.members = members
        self.schedule = Schedule(shares)
        several = len(members) > 1
        self.orders = [
            Order(len(mine), seed, f"{name} source {number}" if several else name)
            for number, mine in enumerate(members)
        ]

    def __getitem__(self, turn: int) -> int:
        group, position = self.schedule[turn]
        return int(self.members[group][self.orders[group][position]])


class Plan:
    """The item of every position of a run.

    Args:
        items: what is trained on.
        batch: images per optimiser step over all processes.
        seed: of the run.
    """

    def __init__(self, items: Items, batch: int, seed: int) -> None:
        self.items, self.batch = items, batch
        counts = np.bincount(items.source, minlength=len(items.sources))
        weights = [source.weight for source in items.sources]
        weighted = any(weight is not None for weight in weights)
        # What one picture weighs.
        each = [
            1.0 if weight is None else weight / count if count else 0.0
            for weight, count in zip(weights, counts.tolist(), strict=True)
        ]
        shapes, bucket = np.unique(items.shapes, axis=0, return_inverse=True)
        self._buckets, shares = [], []
        for number, (width, height) in enumerate(shapes.tolist()):
            mine = np.flatnonzero(bucket.reshape(-1) == number).astype(np.int32)
            groups, weigh = [mine], [float(len(mine))]
            if weighted:
                sources = items.source[mine]
                present = [s for s in np.unique(sources).tolist() if each[s]]
                groups = [mine[sources == s] for s in present]
                weigh = [len(g) * each[s] for g, s in zip(groups, present, strict=True)]
            if groups:
                name = f"order {width}x{height}" if len(shapes) > 1 else "order"
                self._buckets.append(_Bucket(groups, weigh, seed, name))
                shares.append(sum(weigh))
        self._schedule = Schedule(shares)

    def __getitem__(self, position: int) -> Item:
        """The item at ``position``, counted in images from the start of the run."""
        number, offset = divmod(position, self.batch)
        bucket, before = self._schedule[number]
        return self.items[self._buckets[bucket][before * self.batch + offset]]
