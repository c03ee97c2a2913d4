"""What is odd about single pictures: their size, how they are stored, what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from PIL import Image

from ldm.data.audit.report import Finding, Severity
from ldm.data.buckets import Buckets

HUGE = 4096
"""Pixels along a side from which a picture costs more to decode than to train on."""
_DETAILS = {"unused-profile": "profile", "left-out": "left_out"}  # findings: columns of traits
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
_EDGES = (1 / 3, 1 / 2, 2 / 3, 9 / 10, 10 / 9, 3 / 2, 2, 3)
_RANGES = (
    "taller than 1:3",
    "1:3 to 1:2",
    "1:2 to 2:3",
    "2:3 to 9:10",
    "about square",
    "10:9 to 3:2",
    "3:2 to 2:1",
    "2:1 to 3:1",
    "wider than 3:1",
)


def check_sizes(
    keys: Sequence[str], sizes: np.ndarray, size: int, buckets: Buckets, refused: bool = False
) -> Iterator[Finding]:
    """Pictures too small, too large or too long; details give their sizes.

    Args:
        keys: of the pictures.
        sizes: width and height, ``n 2``.
        size: side of the training pictures.
        buckets: give step and longest aspect ratio, and say whether small pictures are enlarged.
        refused: whether a picture that is too small for them ends the run.
    """
    shortest, longest = sizes.min(1), sizes.max(1)
    less = (shortest < buckets.step) & (not buckets.upscale)
    checks: list[tuple[str, Severity, str, str, np.ndarray]] = [
        (
            "smaller-than-a-step",
            "error" if refused else "warning",
            f"pictures smaller than {buckets.step} pixels along a side, a step of the buckets",
            "a run with buckets refuses them: remove them, or set a smaller step, or"
            " images.buckets.upscale, or on_bad_sample to skip",
            less,
        ),
        (
            "small",
            "warning",
            f"pictures smaller than {size} pixels along a side",
            "enlarged they teach blur: leave them out, or train at a smaller size",
            ~less & (shortest < size),
        ),
        (
            "huge",
            "note",
            f"pictures larger than {HUGE} pixels along a side",
            "every use decodes all of it: smaller copies train faster",
            longest > HUGE,
        ),
        (
            "long",
            "note",
            f"pictures longer than {buckets.max_aspect:g} : 1",
            "they are cut to that",
            longest > buckets.max_aspect * shortest,
        ),
    ]
    for kind, severity, what, cure, which in checks:
        found = np.flatnonzero(which).tolist()
        if found:
            details = {keys[i]: f"{sizes[i, 0]}x{sizes[i, 1]}" for i in found}
            yield Finding(kind, severity, what, cure, list(details), details)


def check_traits(keys: Sequence[str], traits: pa.Table) -> Iterator[Finding]:
    """Pictures that show nothing, or that are stored in an unusual way and will be converted."""
    modes = np.array(traits["mode"].to_pylist(), dtype=object)

    def column(name: str) -> np.ndarray:
        return traits[name].to_numpy().astype(bool)

    formats = zip(keys, traits["format"].to_pylist(), strict=True)
    misnamed = np.array([_misnamed(key, kept) for key, kept in formats], bool)
    checks: list[tuple[str, Severity, str, str, np.ndarray]] = [
        (
            "blank",
            "warning",
            "pictures of a single colour",
            "they show nothing: remove them",
            column("blank"),
        ),
        (
            "float",
            "warning",
            "pictures of floating-point values",
            "0 ... 1 is taken for 0 ... 255, and what goes further as it stands: save them with"
            " 8 bits",
            modes == "F",
        ),
        (
            "32-bit",
            "warning",
            "pictures of whole numbers of 32 bits",
            "taken for 8 bits where none is above 255, else for 16: save them with 8 bits",
            modes == "I",
        ),
        (
            "cmyk",
            "warning",
            "pictures in CMYK without a colour profile",
            "converted without one, colours shift: save them as sRGB",
            (modes == "CMYK") & ~column("converted"),
        ),
        (
            "unused-profile",
            "warning",
            "pictures whose colour profile cannot be used",
            "read as without it: save them as sRGB",
            _said(traits, "profile"),
        ),
        (
            "colour-profile",
            "note",
            "pictures with a colour profile other than sRGB",
            "converted to sRGB",
            column("converted"),
        ),
        (
            "other-gamma",
            "note",
            "PNGs that name another gamma or other primaries than those of sRGB, and no profile",
            "read as sRGB, as by most programs: save them as sRGB if colours matter",
            column("declared"),
        ),
        (
            "left-out",
            "note",
            "pictures with text, EXIF or a profile that cannot be read",
            "the pixels are read and the rest is left out",
            _said(traits, "left_out"),
        ),
        ("16-bit", "note", "pictures of 16 bits", "scaled to 8 bits", np.isin(modes, _DEEP)),
        ("grey", "note", "grey pictures", "become RGB", np.isin(modes, _GREY)),
        ("palette", "note", "pictures with a palette", "become RGB", np.isin(modes, ("P", "PA"))),
        (
            "transparent",
            "note",
            "pictures that are transparent in places",
            "laid over images.background (white)",
            column("transparent"),
        ),
        ("rotated", "note", "pictures that EXIF turns", "are turned upright", column("turned")),
        ("animated", "note", "animations", "the first frame is used", column("animated")),
        (
            "misnamed",
            "note",
            "files whose suffix names another format than theirs",
            "read as what they are; other programs may not",
            misnamed,
        ),
    ]
    for kind, severity, what, cure, which in checks:
        numbers = np.flatnonzero(which).tolist()
        if numbers:
            found = [keys[i] for i in numbers]
            column_of = _DETAILS.get(kind)
            told = traits[column_of].take(numbers).to_pylist() if column_of else ()
            yield Finding(kind, severity, what, cure, found, dict(zip(found, told, strict=False)))


def _said(traits: pa.Table, name: str) -> np.ndarray:
    """Where a column of texts is not empty, bool ``n``."""
    return np.array([bool(text) for text in traits[name].to_pylist()], bool)


def _misnamed(key: str, kept: str) -> bool:
    """Whether the key ends like a format that is not the one it is kept in."""
    suffixes = Image.registered_extensions()
    named = suffixes.get(PurePosixPath(key).suffix.lower())
    kept = "JPEG" if kept == "MPO" else kept  # a JPEG with previews behind it
    return bool(kept) and named is not None and named != kept


def aspects(sizes: np.ndarray) -> list[tuple[str, int]]:
    """How many pictures have a ratio of width to height in each range, from tall to wide."""
    place = np.searchsorted(_EDGES, sizes[:, 0] / sizes[:, 1])
    counts = np.bincount(place, minlength=len(_RANGES))
    return list(zip(_RANGES, counts.tolist(), strict=True))
