"""Which example the n-th image of a run is: endless permutations and fixed proportions.

Position n of a group falls into epoch n // N at place n % N, and epoch e is a permutation drawn
from ``stream(seed, name, e)``. So after any number of images the use counts of two examples of a
group differ by at most one. Which group is next follows from a schedule that is fixed as well; so
any position is found without going through those before it.

Of millions of pictures in shards such a permutation reads each from another place. ``WindowOrder``
permutes the shards instead, and mixes the pictures of a few of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ldm.diffusion import stream


class Endless(Protocol):
    """An endless sequence of numbers below some N, each turn of N of them a permutation."""

    def __getitem__(self, position: int) -> int:
        """The number at ``position``."""
        ...


@lru_cache(maxsize=64)
def _permutation(seed: int, name: str, epoch: int, length: int) -> np.ndarray:
    kind = np.int32 if length < 2**31 else np.int64
    return stream(seed, name, epoch).permutation(length).astype(kind)


@dataclass(frozen=True)
class Order:
    """The endless order of ``length`` examples under ``seed``; ``name`` tells groups apart."""

    length: int
    seed: int
    name: str = "order"

    def __getitem__(self, position: int) -> int:
        """Example at ``position``, counted in images from the start of the run."""
        epoch, place = divmod(position, self.length)
        return int(_permutation(self.seed, self.name, epoch, self.length)[place])


class _Epoch(NamedTuple):
    """A permutation of the shards, cut into windows of nearly equal numbers of shards.

    Args:
        number: which epoch.
        shards: in their order.
        edges: places in ``shards`` where windows begin, and the end.
        starts: places in the epoch where windows begin, and the end.
    """

    number: int
    shards: np.ndarray
    edges: np.ndarray
    starts: np.ndarray


class _Window(NamedTuple):
    """The examples of a window, shard by shard, shuffled within each; ``number`` counts windows of
    all epochs.
    """

    number: int
    rows: np.ndarray


class WindowOrder:
    """The endless order of examples in shards, of which few are in use at a time.

    An epoch is a permutation of the shards, cut into windows of at most ``window`` of them. The
    pictures of a window are laid out as a table of ``batch`` columns, down the columns, shard after
    shard and shuffled within each, and are used row by row. So a batch has pictures of all shards
    of its window, and a rank, whose part of every batch is the same columns, reads its own part of
    the shards: of S shards in a window and W ranks about S / W + 1, whatever W is. It is one
    permutation an epoch at any W; a position costs that of the shards and that of one window.

    Groups of one family (the shapes of the pictures of one source) take the shards in the same
    order, so that those which keep step with each other are in the same shards.

    Args:
        shards: number of the shard of every example, ascending, ``n``.
        every: the shards of the family, ascending.
        window: most shards of a window.
        batch: images of the global batch.
        seed: of the run.
        name: tells groups apart.
        family: tells families apart.
    """

    def __init__(
        self,
        shards: np.ndarray,
        every: np.ndarray,
        *,
        window: int,
        batch: int,
        seed: int,
        name: str = "order",
        family: str = "order",
    ) -> None:
        # Where each shard begins, and the end; some may have none of these examples.
        self.bounds = np.append(np.searchsorted(shards, every), len(shards))
        self.batch, self.seed, self.name, self.family = batch, seed, name, family
        self.windows = -(-len(every) // window)
        self._epoch: _Epoch | None = None
        self._window: _Window | None = None

    def __getitem__(self, position: int) -> int:
        """Example at ``position``; positions are taken to be aligned with batches."""
        length = int(self.bounds[-1])
        number, place = divmod(position, length)
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            epoch = self._epoch = self._permuted(number)
        turn = int(np.searchsorted(epoch.starts, place, side="right")) - 1
        count = number * self.windows + turn
        window = self._window
        if window is None or window.number != count:
            window = self._window = _Window(count, self._mixed(epoch, turn))
        start = number * length + int(epoch.starts[turn])
        return int(window.rows[_down(position, start, len(window.rows), self.batch)])

    def _permuted(self, number: int) -> _Epoch:
        shards = stream(self.seed, f"{self.family} shards", number).permutation(
            len(self.bounds) - 1
        )
        edges = np.linspace(0, len(shards), self.windows + 1).astype(np.int64)
        lengths = np.diff(self.bounds)[shards]
        return _Epoch(number, shards, edges, np.append(0, np.cumsum(lengths))[edges])

    def _mixed(self, epoch: _Epoch, turn: int) -> np.ndarray:
        draw = stream(self.seed, f"{self.name} window", epoch.number * self.windows + turn)
        chosen = epoch.shards[epoch.edges[turn] : epoch.edges[turn + 1]]
        spans = ((int(self.bounds[s]), int(self.bounds[s + 1])) for s in chosen)
        rows = [first + draw.permutation(last - first) for first, last in spans]
        return np.concatenate(rows).astype(np.int32)


def _down(position: int, start: int, length: int, columns: int) -> int:
    """How many of the ``length`` positions from ``start`` on come before ``position`` if they are
    counted column by column; the column of a position is its remainder by ``columns``.
    """
    column, first = position % columns, start % columns
    # Every column has `rows` of the positions, and the `longer` ones from `first` on one more.
    rows, longer = divmod(length, columns)
    more = min(max(column - first, 0), longer) + min(max(first + longer - columns, 0), column)
    return column * rows + more + (position - start) // columns


class Schedule:
    """Which of several groups a turn belongs to, in fixed proportions at any length.

    Turn k of a period of M falls into the slot k A mod M, with A prime to M and near M / phi, and
    group g owns as many slots as its share. So a period visits every slot once, which makes the
    proportions exact, and any stretch of turns has close to its share of each group (a Kronecker
    sequence with the golden ratio).

    Args:
        shares: positive, one a group. Integers with a sum of up to 2^20 are met exactly, all others
            to one part in a million.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        if not shares or min(shares) <= 0:
            raise ValueError(f"shares must be positive, not {list(shares)}")
        whole = all(float(share).is_integer() for share in shares)
        if whole:
            divisor = math.gcd(*(int(share) for share in shares))
            slots = [int(share) // divisor for share in shares]
        if not whole or sum(slots) > 2**20:
            total = sum(shares)
            slots = [max(1, round(share / total * 2**20)) for share in shares]
        self.slots = slots
        period = sum(slots)
        stride = max(1, round(period / ((1 + math.sqrt(5)) / 2)))
        while math.gcd(stride, period) != 1:
            stride += 1
        slot = np.arange(period, dtype=np.int64) * stride % period
        self._group = np.searchsorted(np.cumsum(slots), slot, side="right").astype(np.int16)
        # How often its group came before, within the period.
        self._before = np.empty(period, np.int32)
        for group in range(len(slots)):
            mine = self._group == group
            self._before[mine] = np.arange(mine.sum())

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Group of ``turn``, and how often that group came before it."""
        periods, place = divmod(turn, len(self._group))
        group = int(self._group[place])
        return group, periods * self.slots[group] + int(self._before[place])


def positions(start: int, *, batch: int, micro: int, rank: int, world: int, stop: int):
    """Positions of every micro-batch of one rank, from image ``start`` to image ``stop``.

    Rank r works on the r-th part of every global batch of ``batch`` images, ``micro`` at a time:
    which image is drawn, and with which noise, depends on its position alone.
    """
    share = batch // world
    for first in range(start, stop, batch):
        mine = first + rank * share
        for offset in range(0, share, micro):
            yield list(range(mine + offset, mine + offset + micro))
