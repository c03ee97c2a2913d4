"""Which example the n-th image of a run is: endless permutations and fixed proportions.

Position n of a group falls into epoch n // N at place n % N, and epoch e is a permutation drawn
from ``stream(seed, name, e)``. So after any number of images the use counts of two examples of a
group differ by at most one. Which group is next follows from a schedule that is fixed as well; so
any position is found without going through those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.diffusion import stream


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
