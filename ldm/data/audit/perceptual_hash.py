"""Which pictures look alike: resized, re-encoded, slightly cropped or brighter copies.

    bits  = C > 0.1 rms(C),   C = the 64 lowest frequencies, but the mean, of the cosine transform
                              of 32 x 32 grey means
    thumb = 8 x 8 means in colour
    alike = bits differ in at most 9 of 64, and one thumb is the other times a gain plus an offset
            to within 10 of 255 levels (root mean square)

The bits alone would take a red heart for a blue one; the thumbs alone would have to be compared
each with each. The margin above zero keeps frequencies that a drawing does not have (all odd ones,
if it is symmetric) from being decided by rounding.

Pairs are found without comparing all: of five bands of 13 or 12 bits that 9 differences fall into,
one has at most one. So whoever is near shares the key of some band up to one flipped bit
(multi-index hashing: Norouzi, Punjani & Fleet 2012).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

DISTANCE = 9
"""Most bits of 64 that differ."""
RESIDUAL = 10.0
"""Most that thumbs differ behind gain and offset, in levels of 255."""
_GAIN = 2.0
_SIDE, _THUMB = 32, 8
_BANDS = [list(range(band, 64, 5)) for band in range(5)]  # each from low to high frequencies
_PAIRS = 2**21  # candidates at a time: 16 MB a column
_CHECKS = 2**16  # thumbs at a time


class PerceptualHash(NamedTuple):
    """What a picture looks like, in 200 bytes.

    Args:
        bits: 64, the lowest frequency in the lowest bit.
        thumb: 8 x 8 x 3 values, row by row.
    """

    bits: int
    thumb: bytes


def _transform() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cosine matrix, and row and column of the 64 lowest frequencies."""
    k, n = np.arange(_SIDE)[:, None], np.arange(_SIDE)[None]
    matrix = np.cos(np.pi * k * (n + 0.5) / _SIDE)
    matrix[0] *= 0.5**0.5
    waves = [(u, v) for u in range(11) for v in range(11) if u + v]
    lowest = np.array(sorted(waves, key=lambda uv: (sum(uv), uv))[:64])
    return matrix, lowest[:, 0], lowest[:, 1]


_COSINES, _ROWS, _COLUMNS = _transform()


def look_of(image: Image.Image) -> PerceptualHash:
    """The look of an RGB picture of any size."""
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    grey = small @ [0.299, 0.587, 0.114]
    waves = (_COSINES @ grey @ _COSINES.T)[_ROWS, _COLUMNS]
    bits = np.packbits(waves > 0.1 * np.sqrt((waves**2).mean()), bitorder="little")
    block = _SIDE // _THUMB
    thumb = small.reshape(_THUMB, block, _THUMB, block, 3).mean((1, 3))
    return PerceptualHash(
        int.from_bytes(bits.tobytes(), "little"), thumb.round().astype(np.uint8).tobytes()
    )


def groups(bits: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Number of the first picture of each one's group; whoever is alike shares a group.

    Args:
        bits: uint64 ``n``.
        thumbs: uint8 ``n 192``.
    """
    root = np.arange(len(bits))
    # Equal bits first, each against the first of them: a thousand copies are not a million pairs.
    _, first, which = np.unique(bits, return_index=True, return_inverse=True)
    same = np.flatnonzero(first[which] != root)
    left = _join(root, first[which[same]], same, thumbs)
    rest = np.setdiff1d(root, left)
    for i, j in _near(bits[rest]):
        _join(root, rest[i], rest[j], thumbs)
    return root


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ, of two arrays of uint64."""
    return np.bitwise_count(a ^ b)


def _join(root: np.ndarray, i: np.ndarray, j: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Joins the groups of those pairs whose thumbs agree, in place; returns their ``j``."""
    apart = root[i] != root[j]
    i, j = i[apart], j[apart]
    agree = np.zeros(len(i), bool)
    for at in range(0, len(i), _CHECKS):
        part = slice(at, at + _CHECKS)
        agree[part] = _agree(thumbs[i[part]], thumbs[j[part]])
    i, j = i[agree], j[agree]
    while True:
        a, b = root[i], root[j]
        if (a == b).all():
            return j
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root[:] = root[root]


def _agree(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether rows are each other's up to gain, offset and ``RESIDUAL``."""
    x, y = (v.astype(np.float32) - v.mean(1, keepdims=True, dtype=np.float32) for v in (x, y))
    xy, xx, yy = (x * y).sum(1), (x * x).sum(1), (y * y).sum(1)
    # Least squares of y on x leaves yy - xy^2 / xx; the worse of the two ways round counts.
    left = np.maximum(xx, yy) - xy**2 / np.maximum(np.minimum(xx, yy), 1e-6)
    gain = xy / np.maximum(xx, 1e-6)
    return (left <= RESIDUAL**2 * x.shape[1]) & (gain > 1 / _GAIN) & (gain < _GAIN)


def _near(bits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) that differ in at most ``DISTANCE`` bits; some come more than once."""
    for band in _BANDS:
        key = np.zeros(len(bits), np.int64)
        for place, bit in enumerate(band):
            key |= ((bits >> np.uint64(bit)) & np.uint64(1)).astype(np.int64) << place
        order = np.argsort(key, kind="stable")
        for i, j in _pairs(key[order], len(band)):
            i, j = order[i], order[j]
            near = distance(bits[i], bits[j]) <= DISTANCE
            if near.any():
                yield i[near], j[near]


def _pairs(key: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of every pair whose sorted keys of ``width`` bits differ in at most one bit."""
    edges = np.searchsorted(key, np.arange(2**width + 1))
    places = np.arange(len(key))
    yield from _ranges(places, places + 1, edges[key + 1])
    for bit in range(width):
        lower = np.flatnonzero(key >> bit & 1 == 0)
        other = key[lower] | 1 << bit
        yield from _ranges(lower, edges[other], edges[other + 1])


def _ranges(
    left: np.ndarray, first: np.ndarray, last: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each of ``left`` with everything from ``first`` to before ``last``, some pairs at a time."""
    counts = last - first
    before = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start < len(left):
        stop = int(np.searchsorted(before, before[start] + _PAIRS, side="right")) - 1
        part = slice(start, max(stop, start + 1))
        count = counts[part]
        steps = np.arange(count.sum()) - np.repeat(before[part] - before[start], count)
        yield np.repeat(left[part], count), np.repeat(first[part], count) + steps
        start = part.stop
