"""Where pictures and captions come from.

A source is a finite, ordered list of examples. Everything about an example but its pixels is known
up front, so that a run can be planned (splits, orders, caches) without opening a single picture;
the pixels are read on demand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image


class DataError(ValueError):
    """The data cannot be used; the message is one line that says what is wrong, where, and what to
    do.
    """


@dataclass(frozen=True)
class Example:
    """One picture of a source.

    Args:
        key: unique and stable within its source (``"twemoji/1f34e"``, a relative file name).
        captions: at least one; evaluation uses the first, training draws one per use.
        held_out: never trained on.
    """

    key: str
    captions: tuple[str, ...]
    held_out: bool


class Source(Protocol):
    """A list of examples and a way to their pixels."""

    examples: Sequence[Example]

    def load(self, index: int) -> Image.Image:
        """The picture of ``examples[index]`` in its own size and mode. Raises ``DataError`` if it
        cannot be read.
        """
        ...

    def digest(self, index: int) -> str:
        """Hex SHA-256 of what the picture is made from: equal digests are equal pictures."""
        ...


def in_fraction(name: str, fraction: float) -> bool:
    """Whether ``name`` falls into a fixed pseudo-random ``fraction`` of all names, the same on
    every machine.
    """
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def cache_root() -> Path:
    """Folder for what can be made again: ``$LDM_CACHE``, else ``~/.cache/ldm``."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")
