"""Which picture the n-th image of a run is.

    batch of n -> bucket (fixed proportions) -> source (fixed proportions) -> endless permutation

All images of a batch have one shape. Buckets take turns by the number of their pictures, sources by
their weights; within each, pictures come in endless permutations. So any two pictures of a bucket
and source are used equally often (to one use), and all of it is a function of (seed, n). With a
window the permutation goes through the shards of a source, few at a time.
"""

from __future__ import annotations

import logging

import numpy as np

from ldm.data.items import Item, Items
from ldm.data.order import Endless, Order, Schedule, WindowOrder

log = logging.getLogger(__name__)


class _Bucket:
    """The pictures of one shape, by source where sources have weights."""

    def __init__(
        self, members: list[np.ndarray], shares: list[float], orders: list[Endless]
    ) -> None:
        self.members, self.orders = members, orders
        self.schedule = Schedule(shares)

    def __getitem__(self, turn: int) -> int:
        group, position = self.schedule[turn]
        return int(self.members[group][self.orders[group][position]])


class Plan:
    """The item of every position of a run.

    Args:
        items: what is trained on.
        batch: images per optimiser step over all processes.
        seed: of the run.
        window: shards of a source (tars, row groups) that are in use at a time; None: all.
    """

    def __init__(self, items: Items, batch: int, seed: int, window: int | None = None) -> None:
        self.items, self.batch = items, batch
        shards = None if window is None else items.shards()
        if shards is not None and not shards.any():
            log.warning("order.window changes nothing: the pictures do not lie in several shards")

        def order(members: np.ndarray, name: str, source: int | None) -> Endless:
            if window is None or shards is None:
                return Order(len(members), seed, name)
            family = shards if source is None else shards[items.source == source]
            of = "order" if source is None else f"order source {source}"
            return WindowOrder(
                shards[members], np.unique(family),
                window=window, batch=batch, seed=seed, name=name, family=of,
            )  # fmt: skip

        counts = np.bincount(items.source, minlength=len(items.sources))
        weights = [source.weight for source in items.sources]
        weighted = any(weight is not None for weight in weights)
        # What one picture weighs.
        each = [
            1.0 if weight is None else weight / count if count else 0.0
            for weight, count in zip(weights, counts.tolist(), strict=True)
        ]
        shapes = items.by_shape()
        self._buckets, shares = [], []
        for (width, height), numbers in shapes:
            mine = numbers.astype(np.int32)
            name = f"order {width}x{height}" if len(shapes) > 1 else "order"
            groups: list[tuple[int | None, np.ndarray]] = [(None, mine)]
            if weighted:
                of = items.source[mine]
                groups = [(s, mine[of == s]) for s in np.unique(of).tolist() if each[s]]
            weigh = [len(group) * (1.0 if s is None else each[s]) for s, group in groups]
            if groups:
                several = len(groups) > 1
                orders = [
                    order(group, f"{name} source {n}" if several else name, s)
                    for n, (s, group) in enumerate(groups)
                ]
                self._buckets.append(_Bucket([group for _, group in groups], weigh, orders))
                shares.append(sum(weigh))
        self._schedule = Schedule(shares)

    def __getitem__(self, position: int) -> Item:
        """The item at ``position``, counted in images from the start of the run."""
        number, offset = divmod(position, self.batch)
        bucket, before = self._schedule[number]
        return self.items[self._buckets[bucket][before * self.batch + offset]]
