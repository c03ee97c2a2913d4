"""Random numbers that are a pure function of (seed, name, index).

There is no global random state in a run. Every draw (order, crop, caption, dropout, posterior,
noise, time) comes from ``stream(seed, name, index)``, where ``index`` counts images from the start
of the run. So the whole state of all randomness is one integer, and image ``index`` meets the same
noise on 1 or 8 processes, at any micro-batch size.

Philox is a counter-based generator (Salmon et al. 2011): key = hash of seed and name, counter =
index.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the drawing of pictures by code needs no tensors
    from torch import Tensor


@lru_cache(maxsize=1024)
def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """The generator of draw ``index`` of stream ``name``; 2^128 numbers apart from that of ``index
    + 1``.
    """
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    key = np.array(_key(seed, name), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 tensor of ``shape``."""
    import torch

    return torch.from_numpy(stream(seed, name, index).standard_normal(shape, dtype=np.float32))


def stratified(seed: int, name: str, batch: int, size: int) -> np.ndarray:
    """Float64 ``u_j = (perm(j) + U_j) / size``: one point in each of ``size`` equal cells of [0,
    1), in random order.

    ``batch`` is the number of the global batch, ``size`` its images. Every u_j alone is uniform,
    and the mean over a batch varies less than that of independent draws (the low-discrepancy
    sampler of Kingma et al. 2021, appendix I.1, with a shuffle and independent jitter).
    """
    draw = stream(seed, name, batch)
    return (draw.permutation(size) + draw.random(size)) / size
