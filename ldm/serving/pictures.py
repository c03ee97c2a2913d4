"""Pictures that requests bring: bounded in pixels before anything of them is decoded."""

from __future__ import annotations

import io
import struct

from PIL import Image

from ldm.data.images import flatten
from ldm.data.picture import decode

MOST = 4096 * 4096
"""Pixels of one."""


def bounded(data: bytes, where: str) -> bytes:
    """``data``; ``ValueError`` if it is a file of more than ``MOST`` pixels, or of nothing that
    Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        width, height = MOST, MOST
    except (OSError, ValueError, SyntaxError, struct.error):
        raise ValueError(f"{where}: it is no picture that can be read") from None
    if width * height > MOST:
        raise ValueError(f"{where}: a picture of more than {MOST:,} pixels is not taken")
    return data


def opened(data: bytes, where: str) -> Image.Image:
    """The picture of a file, upright, in sRGB, with its transparency.

    Raises:
        ValueError: it is none, or too large; the message begins with ``where``.
    """
    return decode(bounded(data, where), where)


def flat(data: bytes, where: str, *, white: bool = True) -> Image.Image:
    """The same in RGB, what is transparent over white or black."""
    return flatten(opened(data, where), (255, 255, 255) if white else (0, 0, 0))
