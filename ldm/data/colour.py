"""Colour profiles: the colours of a picture file -> sRGB, which is what networks are shown.

Relative colorimetric with black point compensation, as Photoshop converts and as browsers show
profiles of cameras and displays (those have one way only). A profile that moves no colour by more
than a level of 255 is sRGB, whatever its name (the measure of Chrome's skcms): its pixels stay as
they are, bit by bit, as those of a file without a profile.

Chunks of PNG that give a gamma or primaries without a profile (gAMA, cHRM) are not applied: most
programs write them by habit, and many read none. ``declares_other`` tells which differ.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from ldm.data.container import LARGEST_PROFILE

HOW = "to sRGB 1"
"""Names the conversion in hashes; raise the number when it gives other colours."""

_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_TOLERANCE = 1  # level of 255
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of profiles: Pillow's modes
_GREY = ("1", "L", "LA")
# White, red, green and blue of sRGB, and its gamma as PNG has it.
_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_GAMMA = 0.45455


class Converted(NamedTuple):
    """A picture in sRGB.

    Args:
        picture: without a profile.
        how: names what was done with its colours; "" nothing.
        unused: why its profile was not used; "" it was, or there was none.
    """

    picture: Image.Image
    how: str = ""
    unused: str = ""


def to_srgb(picture: Image.Image) -> Converted:
    """``picture``, of 8 bits, in sRGB. A profile that cannot be used counts as none."""
    there = "icc_profile" in picture.info
    profile = picture.info.pop("icc_profile", None)
    if not profile:
        # So Pillow says that it cannot put the profile together.
        return Converted(picture, unused="it is cut off or damaged" if there else "")
    try:
        mode, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError, ImportError, ValueError) as error:
        # lcms says nothing but that it could not, twice.
        text = str(error) if isinstance(error, (ImportError, _UnfitError)) else "it is damaged"
        return Converted(picture, unused=text)
    if (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and picture.mode not in _GREY):
        return Converted(picture, unused=f"it is for {mode}, the picture is {picture.mode}")
    if transform is None:
        return Converted(picture)
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    made = ImageCms.applyTransform(picture.convert(mode), transform)
    assert made is not None
    if alpha is not None:
        made.putalpha(alpha)
    made.info = {k: v for k, v in picture.info.items() if k not in ("icc_profile", "transparency")}
    return Converted(made, HOW)


def declares_other(info: Mapping[Any, Any]) -> bool:
    """Whether the chunks of a PNG say, without a profile, that its colours are not sRGB."""
    if "srgb" in info or "icc_profile" in info:
        return False
    gamma, primaries = info.get("gamma", _GAMMA), info.get("chromaticity", _CHROMATICITY)
    other = max(abs(one - two) for one, two in zip(primaries, _CHROMATICITY, strict=True))
    return abs(gamma - _GAMMA) > 0.01 or other > 0.01


class _UnfitError(ValueError):
    """Why a profile is not used, as a phrase."""


# By the bytes themselves: the pictures of one camera share a profile, and its transform.
@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile is for, and its way to sRGB; None if it is sRGB."""
    if len(profile) > LARGEST_PROFILE:
        raise _UnfitError(f"it has more than {LARGEST_PROFILE >> 20} MB")
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in _SPACES:
        raise _UnfitError(f"it is for {space}")
    mode = _SPACES[space]
    transform = ImageCms.buildTransform(
        opened, ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT, _FLAGS
    )
    if mode == "CMYK":
        return mode, transform
    plain = _every(mode)
    made = ImageCms.applyTransform(plain, transform)
    moved = np.asarray(made, np.int16) - np.asarray(plain.convert("RGB"), np.int16)
    return mode, transform if np.abs(moved).max() > _TOLERANCE else None


@cache
def _every(mode: str) -> Image.Image:
    """Every grey; with ``mode`` RGB also every 15th level of each colour with those of others."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    if mode == "L":
        return Image.fromarray(greys[..., 0])
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([greys, grid], 1))
