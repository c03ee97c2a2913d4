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
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

if TYPE_CHECKING:  # the drawing of pictures by code needs no tensors
    from torch import Tensor


class _Key(ISeedSequence):
    """The key of a stream, handed to Philox as a seed: where a key is passed, NumPy hashes entropy
    of the system for a seed that nobody asks for, three times the cost of all else.
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._words = np.frombuffer(digest[:16], "<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The key, two words of 64 bits: all that Philox asks for."""
        assert (n_words, dtype) == (2, np.uint64)
        return self._words


@lru_cache(maxsize=1024)
def _key(seed: int, name: str) -> Any:  # NumPy takes any ISeedSequence, which its types do not say
    return _Key(seed, name)


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """The generator of draw ``index`` of stream ``name``; 2^128 numbers apart from that of ``index
    + 1``.
    """
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_key(seed, name), counter=counter))


class Streams:
    """The generators of many draws of stream ``name``, at a tenth of what ``stream`` costs: all are
    one that is set anew, so that only the last is of use.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._philox = np.random.Philox(_key(seed, name))
        self._draw, self._state = np.random.Generator(self._philox), self._philox.state
        self._counter = self._state["state"]["counter"]

    def __getitem__(self, index: int) -> np.random.Generator:
        """What ``stream`` gives, until the next is asked for."""
        self._counter[2] = index
        self._philox.state = self._state
        return self._draw


def normal(seed: int, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 tensor of ``shape``."""
    return normals(seed, name, [index], shape)[0]


def normals(seed: int, name: str, indexes: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """``normal`` of several draws, ``b *shape``."""
    import torch

    found, draws = torch.empty(len(indexes), *shape, device="cpu"), Streams(seed, name)
    for index, row in zip(indexes, found.numpy(), strict=True):
        draws[index].standard_normal(dtype=np.float32, out=row)
    return found


def stratified(seed: int, name: str, batch: int, size: int) -> np.ndarray:
    """Float64 ``u_j = (perm(j) + U_j) / size``: one point in each of ``size`` equal cells of [0,
    1), in random order.

    ``batch`` is the number of the global batch, ``size`` its images. Every u_j alone is uniform,
    and the mean over a batch varies less than that of independent draws (the low-discrepancy
    sampler of Kingma et al. 2021, appendix I.1, with a shuffle and independent jitter).
    """
    draw = stream(seed, name, batch)
    return (draw.permutation(size) + draw.random(size)) / size
