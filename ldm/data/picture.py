"""The bytes of a picture file -> an upright picture, or one line that says why not."""

from __future__ import annotations

import hashlib
import io
import re
from typing import NamedTuple

from PIL import Image, ImageOps

from ldm.data.source import DataError

READABLE = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip
# Pictures that somebody meant to train on, and that would be lost without a word.
UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")


class Facts(NamedTuple):
    """What one look at a file's bytes tells.

    Args:
        digest: SHA-256 of the bytes, 32 bytes.
        width: pixels, upright; 0 if it cannot be read.
        height: pixels, upright.
        problem: why it cannot be read, or "".
    """

    digest: bytes
    width: int
    height: int
    problem: str


class _Undecodable(Exception):
    """Why a picture cannot be decoded, as a phrase."""


def unreadable(reason: str) -> str:
    """The reason of a ``Problem``."""
    return f"pictures that cannot be read ({reason}); repair or remove them"


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise _Undecodable("the file is empty")
    try:
        opened = Image.open(io.BytesIO(data))
        limit, pixels = Image.MAX_IMAGE_PIXELS, opened.width * opened.height
        if limit is not None and pixels > limit:  # Pillow itself only warns up to twice it
            raise _Undecodable(
                f"{opened.width}x{opened.height} pixels are more than the limit of {limit},"
                " PIL.Image.MAX_IMAGE_PIXELS"
            )
        if opened.mode in ("LAB", "La"):  # no transform takes these: Pillow has no way to RGB
            raise _Undecodable(f"pictures of mode {opened.mode} are not read, save them as RGB")
        opened.load()
        return ImageOps.exif_transpose(opened)
    except _Undecodable:
        raise
    except Exception as error:  # a broken file can make a decoder raise anything
        # An address in memory would make equal problems different.
        text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
        raise _Undecodable(" ".join(text.split()) or type(error).__name__) from error


def decode(data: bytes, where: str) -> Image.Image:
    """The picture, turned upright as its EXIF says; of an animation the first frame.

    Args:
        data: of the whole file.
        where: what the error names.

    Raises:
        DataError: it cannot be decoded, or has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    try:
        return _decode(data)
    except _Undecodable as error:
        raise DataError(
            f"{where}: the picture cannot be read ({error}), repair or remove it"
        ) from error


def look(data: bytes) -> Facts:
    """The facts of a file, whatever it holds; decodes all of it, since a header proves nothing."""
    digest = hashlib.sha256(data).digest()
    try:
        picture = _decode(data)
    except _Undecodable as error:
        return Facts(digest, 0, 0, unreadable(str(error)))
    return Facts(digest, picture.width, picture.height, "")
