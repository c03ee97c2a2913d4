"""Values of more than 8 bits -> 8 bits; Pillow alone would clip them, to black or to white.

    whole numbers of 16 bits (of fewer, what the TIFF says)    0 ... 65535 are 0 ... 255
    whole numbers of 32 bits      up to 255 as 8 bits, up to 65535 as 16 bits; else refused
    floating point                0 ... 1 is 0 ... 255; up to 255 as it stands; else refused

What has 8 bits already, and 16 bits without transparency, is what it always was.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.errors import DataError

_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_DARKEST = 16  # of 255: a picture whose brightest value is between 1 and this fits no rule


def eight_bits(image: Image.Image, file: Image.Image, depth: int = 0) -> tuple[Image.Image, str]:
    """``image`` in a mode of 8 bits, and what tells it from what Pillow's values say; "" nothing.

    Args:
        image: of any mode.
        file: it, or what Pillow opened, which still has format and tags.
        depth: bits of a channel of a PNG, 0 of all else.

    Raises:
        DataError: no rule tells what white is, as a phrase.
    """
    if depth:
        image, how = _transparency(image, depth)
        if how:
            return image, how
    if image.mode == "F":
        return _floats(image, _inverted(file))
    if not image.mode.startswith("I"):
        return (image.convert("LA"), "") if image.mode == "La" else (image, "")
    values = np.asarray(image).astype(np.float64)
    white, inverted = 65535, _inverted(file)
    if image.mode != "I":
        bits = getattr(file, "tag_v2", {}).get(_BITS, (16,))[0]
        white = 2**bits - 1 if bits < 16 else white
    elif file.format != "PPM":  # Pillow scales those itself
        _within(values, 0, 65535, "whole numbers")
        white = 255 if values.max() <= 255 else white
    clear = image.info.get("transparency")
    grey = _grey(image, white - values if inverted else values, white)
    if not isinstance(clear, int):
        return grey, "" if white == 65535 and not inverted else _told(white, inverted)
    grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey, "16 bits with transparency"


def _inverted(file: Image.Image) -> bool:
    """Whether 0 is white in a TIFF; Pillow turns it for 8 bits only."""
    return getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _floats(image: Image.Image, inverted: bool) -> tuple[Image.Image, str]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("floating-point values that are not finite, save it with 8 bits")
    _within(values, 0, 255, "floating-point values")
    highest = values.max()
    if 1 < highest < _DARKEST:
        raise DataError(
            f"floating-point values of 0 ... {highest:g} are neither 0 ... 1 nor 0 ... 255,"
            " save it with 8 bits"
        )
    white = 1 if highest <= 1 else 255
    if white == 255 and not inverted:
        return image, ""  # Pillow takes them so
    return _grey(image, white - values if inverted else values, white), _told(white, inverted)


def _grey(image: Image.Image, values: np.ndarray, white: float) -> Image.Image:
    """``values`` in 8 bits, with the colour profile of ``image``."""
    levels = values / (white / 255)
    grey = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return grey


def _told(white: float, inverted: bool) -> str:
    return f"white is {0 if inverted else white} of {white}"


def _within(values: np.ndarray, low: float, high: float, what: str) -> None:
    lowest, highest = values.min(), values.max()
    if lowest < low or highest > high:
        raise DataError(
            f"{what} of {lowest:g} ... {highest:g} do not say what white is, save it with 8 bits"
        )


def _transparency(image: Image.Image, depth: int) -> tuple[Image.Image, str]:
    """With the colour that means transparent in 8 bits, as Pillow has the pixels, not in
    ``depth``.
    """
    clear = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    else:
        return image, ""
    return image, f"transparency of {depth} bits"
