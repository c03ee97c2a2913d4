"""``digits``: 1,797 handwritten digits of 8 x 8 grey pixels, from a package that pip installs.

Package ``scikit-learn`` (what its ``load_digits`` reads): the test set of Alpaydin & Kaynak 1998,
Optical Recognition of Handwritten Digits, UCI repository (CC BY 4.0). Each is captioned with its
name, which is also that of its class.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from PIL import Image

from ldm.data.ranges import Share, Weight
from ldm.data.source import Drawn, Example, in_fraction
from ldm.errors import DataError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitsData(Drawn):
    """Handwritten digits, white on black; the config *is* the source.

    Args:
        digits: which of them.
        hold_out: share of the pictures that is held out.
        weight: share of the draws against other sources'; None: its number of pictures.
    """

    kind: Literal["digits"] = "digits"
    digits: tuple[int, ...] = tuple(range(10))
    hold_out: Share = 0.1
    weight: Weight | None = None

    size = 8

    def __post_init__(self) -> None:
        if not self.digits or not set(self.digits) <= set(range(10)):
            raise DataError(f"digits: digits={list(self.digits)}: choose some of 0 to 9")

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """One example per picture, in the order of the data set."""
        return tuple(
            Example(
                key=f"{number:04d}",
                captions=(f"a handwritten {NAMES[digit]}",),
                held_out=in_fraction(f"digits {number}", self.hold_out),
            )
            for number, digit in self._rows
        )

    def load(self, index: int) -> Image.Image:
        """Grey picture of side 8."""
        return Image.fromarray(_pictures()[0][self._rows[index][0]])

    def digest(self, index: int) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(_pictures()[0][self._rows[index][0]].tobytes()).hexdigest()

    @cached_property
    def _rows(self) -> list[tuple[int, int]]:
        """Number in the data set, and digit."""
        return [(n, d) for n, d in enumerate(_pictures()[1].tolist()) if d in self.digits]


@cache
def _pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 ``n 8 8``, and digits, ``n``."""
    try:
        package = importlib.metadata.distribution("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise DataError("digits: scikit-learn not installed: pip install 'ldm[demo]'") from None
    # What its load_digits reads; to import the package takes seconds.
    rows = np.loadtxt(
        str(package.locate_file("sklearn/datasets/data/digits.csv.gz")), delimiter=","
    )
    pixels = np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return pixels, rows[:, -1].astype(np.int64)
