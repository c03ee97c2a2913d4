"""Which example the n-th image of a run is: an endless sequence of permutations.

Position n falls into epoch n // N at place n % N, and epoch e is a permutation drawn from
``stream(seed, "order", e)``. So after any number of images the use counts of two examples differ
by at most one, and any position is found in O(1) (given the permutation of its epoch).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.diffusion import stream


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return stream(seed, "order", epoch).permutation(length)


@dataclass(frozen=True)
class Order:
    """The endless order of ``length`` examples under ``seed``."""

    length: int
    seed: int

    def __getitem__(self, position: int) -> int:
        """Example at ``position``, counted in images from the start of the run."""
        epoch, place = divmod(position, self.length)
        return int(_permutation(self.seed, epoch, self.length)[place])


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
