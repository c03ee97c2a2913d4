"""Nearest-picture retrieval: is the picture nearest to a drawn one the picture its caption
names?
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Proportion(NamedTuple):
    """A share of ``n`` independent trials with its 95 % Wilson score interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: int, n: int) -> Proportion:
        """The share ``hits / n``."""
        z = 1.959963984540054
        p, scale = hits / n, 1 + z * z / n
        centre = (p + z * z / (2 * n)) / scale
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), n)

    def __str__(self) -> str:
        return (
            f"{100 * self.value:.1f} % (95 % interval {100 * self.low:.1f} to"
            f" {100 * self.high:.1f}, n = {self.n})"
        )


def ranks(queries: Tensor, gallery: Tensor, truth: Tensor) -> Tensor:
    """How many gallery entries lie nearer to each query than its true one: 0 is a hit.

    Args:
        queries: ``n ...`` features, pixels for instance.
        gallery: ``m ...`` features of all candidates.
        truth: ``n`` int64, the true entry of each query.

    Returns:
        ``n`` int64, by Euclidean distance; a tie counts against the query.
    """
    distance = torch.cdist(queries.flatten(1).double(), gallery.flatten(1).double())
    own = distance.gather(1, truth[:, None])
    nearer = (distance <= own).sum(1) - 1
    return nearer
