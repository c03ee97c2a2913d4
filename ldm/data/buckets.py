"""Aspect-ratio buckets: pictures of mixed shapes in batches of one shape, cut little.

A bucket is a width and a height, multiples of ``step`` pixels, of at most the area ``size`` x
``size``. A picture goes to the bucket of the nearest aspect ratio (distance of logarithms, so that
wide and tall are treated alike), is scaled to cover it and cut to it. A picture that is smaller
than its bucket is not enlarged: its bucket is its own size, rounded down to steps. No bucket is
longer than ``max_aspect`` : 1, so what a longer picture shows beyond that is not seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Buckets:
    """Which shapes there are; the config *is* the set of buckets.

    Args:
        step: sides are multiples of this many pixels (and of the autoencoder's factor).
        max_aspect: longest side over shortest; pictures beyond it are cut to it.
        upscale: enlarge pictures that are smaller than their bucket.
    """

    step: int = 64
    max_aspect: float = 2.0
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step={self.step}: a side is at least one pixel")
        if not 1 <= self.max_aspect <= 1000:
            raise ValueError(
                f"max_aspect={self.max_aspect} is no ratio of long to short side, from 1 to 1000"
            )

    def shapes(self, size: int) -> list[Size]:
        """Every bucket of the area ``size`` x ``size``, from tall to wide."""
        return list(_shapes(size, self.step, self.max_aspect))

    def assign(self, sizes: np.ndarray, size: int) -> np.ndarray:
        """The bucket of every picture.

        Args:
            sizes: width and height of the pictures, ``n 2``.
            size: side of the square whose area no bucket exceeds.

        Returns:
            Width and height of the bucket, int32 ``n 2``; 0 where a picture is smaller than one
            step along a side and may not be enlarged.
        """
        shapes = np.array(self.shapes(size), dtype=np.int32)
        ratios = np.log(shapes[:, 0] / shapes[:, 1])
        edges = (ratios[1:] + ratios[:-1]) / 2
        pictures = np.asarray(sizes, dtype=np.int64)
        chosen = shapes[np.searchsorted(edges, np.log(pictures[:, 0] / pictures[:, 1]))]
        if self.upscale:
            return chosen
        small = (pictures < chosen).any(1)
        # Its own size in steps, but no longer than the longest ratio allows.
        own = np.minimum(pictures // self.step, chosen // self.step)
        longest = (own.min(1) * self.max_aspect).astype(np.int64)
        own = np.minimum(own, longest[:, None]) * self.step
        return np.where(small[:, None], own, chosen).astype(np.int32)


@lru_cache(maxsize=32)
def _shapes(size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    most = size * size
    found = set()
    for width in range(step, int(size * max_aspect**0.5) + step + 1, step):
        height = most // width // step * step
        if height and max(width, height) <= max_aspect * min(width, height):
            found |= {(width, height), (height, width)}
    side = size // step * step
    if not side:
        raise ValueError(f"images.size {size} is smaller than a step of the buckets, {step}")
    found.add((side, side))
    # Of shapes with one ratio the largest; of one width the highest.
    best: dict[float, Size] = {}
    for width, height in found:
        ratio = width / height
        if ratio not in best or width > best[ratio][0]:
            best[ratio] = (width, height)
    return tuple(best[ratio] for ratio in sorted(best))


def table(assigned: np.ndarray) -> str:
    """The buckets and how many pictures each has, as lines to read."""
    counts = Counter(map(tuple, assigned.tolist()))
    lines = [f"{'bucket':>12} {'aspect':>7} {'pictures':>9}"]
    for (width, height), count in sorted(counts.items(), key=lambda e: e[0][0] / (e[0][1] or 1)):
        if width:
            lines.append(f"{f'{width}x{height}':>12} {width / height:>7.2f} {count:>9,}")
        else:
            lines.append(f"{'too small':>12} {'':>7} {count:>9,}")
    return "\n".join(lines)
