"""The bytes of a picture file -> an upright picture in sRGB, or one line that says why not.

Every reader of picture files goes through here: sources, checks, evaluation, cached sets. What
stands beside the pixels never makes a picture unreadable: it is left out, and told.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from PIL import Image, ImageFile, ImageOps, features

from ldm.data.colour import to_srgb
from ldm.data.container import MOST_SCANNED, MOST_SCANS, bare, bounded, png_depth, scans
from ldm.data.depth import eight_bits
from ldm.errors import DataError

HEIF = importlib.util.find_spec("pillow_heif") is not None
# Pillow's names of what it reads as one picture, without other programs: of an animation the first
# frame. TGA has no magic number, so it comes last.
_READ = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "HEIF": (".heic", ".heif", ".hif"),
    "TGA": (".tga",),
}
# What Pillow may have been built without.
_LACKING = {
    name
    for name, part in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
    if not features.check(part)
}
_FORMATS = [name for name in _READ if name not in _LACKING and (HEIF or name != "HEIF")]
READABLE = tuple(suffix for name in _FORMATS for suffix in _READ[name])

_PILLOW = "this Pillow does not: pip install -U pillow"
# Pictures that somebody meant to train on, and that would be lost without a word; what helps.
_NOT_READ = {
    **{name: (_READ[name], _PILLOW) for name in _LACKING},
    **({} if HEIF else {"HEIF": (_READ["HEIF"], "pip install 'ldm[heif]' or pillow-heif")}),
    "animated AVIF": ((".avifs",), ""),
    "JPEG XL": ((".jxl",), ""),
    "SVG": ((".svg", ".svgz"), "draw them at the size that you train"),
    "Photoshop": ((".psd", ".psb"), "flatten their layers"),
    "icons": ((".ico", ".icns", ".cur"), "choose one of the sizes"),
    "HDR": ((".exr", ".hdr", ".pfm"), "map their tones"),
    "rare today": ((".pcx", ".dds", ".sgi", ".ras", ".xbm", ".xpm"), ""),
    "camera raw": (
        (".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf",
         ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".erf", ".mrw", ".kdc", ".dcr"),
        "develop them",
    ),
}  # fmt: skip
_NAMED = {
    suffix: ", ".join(filter(None, (name, hint)))
    for name, (suffixes, hint) in _NOT_READ.items()
    for suffix in suffixes
}
UNREADABLE = tuple(_NAMED)

# How files begin that are often named like a picture.
_BEGINNINGS = {
    "HEIF": rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
    "AVIF": rb"....ftyp(avif|avis)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "Photoshop": rb"8BPS",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
    "a web page": rb"(?i)\s*<(!doctype )?html",
    "PDF or PostScript": rb"%PDF|%!PS",
    "an archive": rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf",
    "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
    "a pointer of Git LFS (git lfs pull)": rb"version https://git-lfs",
}
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_CAPTIONS = (".txt", ".caption")


class Facts(NamedTuple):
    """What one look at a file's bytes tells.

    Args:
        digest: SHA-256 of the bytes, 32 bytes; where colours were converted or values scaled, of
            that and how.
        width: pixels, upright; 0 if it cannot be read.
        height: pixels, upright.
        problem: why it cannot be read, or "".
    """

    digest: bytes
    width: int
    height: int
    problem: str


class Reading(NamedTuple):
    """A picture, and what became of its file on the way.

    Args:
        picture: upright, in sRGB, in a mode that ``ldm.data.images.flatten`` takes.
        file: as Pillow opened it.
        how: names what was done with its values; "" nothing but turning it.
        converted: whether that was to apply a colour profile.
        turned: whether EXIF turns it.
        profile: why its colour profile is not used, or "".
        left_out: what stood beside the pixels and was left out, or "".
    """

    picture: Image.Image
    file: ImageFile.ImageFile
    how: str
    converted: bool
    turned: bool
    profile: str
    left_out: str


class _Undecodable(Exception):
    """Why a picture cannot be decoded, as a phrase."""


def unreadable(reason: str) -> str:
    """The reason of a ``Problem``."""
    return f"pictures that cannot be read ({reason}); repair or remove them"


def not_read(key: str) -> str:
    """The reason of a ``Problem`` of a file whose suffix is in ``UNREADABLE``."""
    named = _NAMED[PurePosixPath(key.lower()).suffix]
    return f"pictures in a format that is not read ({named}); save them as PNG or JPEG"


def passed_by(names: Iterable[str], documents: tuple[str, ...]) -> Counter[str]:
    """How many of the files ``names`` have which suffix that says nothing to a source of pictures
    with captions; tables, and what begins with one of ``documents``, are not counted.
    """
    known, others = (*READABLE, *UNREADABLE, *_CAPTIONS), Counter[str]()
    for name in names:
        if not name.lower().endswith(known):
            path = PurePosixPath(name)
            if not path.stem.lower().startswith(("metadata", *documents)):
                others[path.suffix.lower() or path.name] += 1
    return others


def listed(found: Counter[str]) -> str:
    """``3 .mp4, 1 .zip``: the most frequent first, eight at most."""
    shown = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(8))
    return shown + (", ..." if len(found) > 8 else "")


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The picture, its pixels read. Raises anything."""
    if HEIF:
        _register_heif()
    opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    limit, pixels = Image.MAX_IMAGE_PIXELS, opened.width * opened.height
    if limit is not None and pixels > limit:  # Pillow itself only warns up to twice it
        raise _Undecodable(
            f"{opened.width}x{opened.height} pixels are more than the limit of {limit},"
            " PIL.Image.MAX_IMAGE_PIXELS"
        )
    most = min(MOST_SCANS, MOST_SCANNED // max(pixels, 1))
    if scans(data) > most:
        raise _Undecodable(
            f"a JPEG of more than {most} scans, the limit at its size, takes too long: save it anew"
        )
    if opened.mode == "LAB":  # Pillow takes it for what it is not
        raise _Undecodable("pictures of mode LAB are not read, save them as RGB")
    opened.load()
    return opened


def _register_heif() -> None:
    if "HEIF" not in Image.OPEN:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _whole(data: bytes) -> tuple[ImageFile.ImageFile, str]:
    """The picture, and what of the file was left out, or ""."""
    shown = bounded(data)
    try:
        return _opened(shown), "" if shown is data else "metadata of several MB"
    except _Undecodable:
        raise
    except Exception:  # a broken file can make a decoder raise anything
        left = bare(data)
        if left is None:
            raise
    opened = _opened(left.data)
    if left.profile or left.cut:
        opened.info["icc_profile"] = left.profile
    return opened, "text or metadata, too large or damaged"


def _upright(file: ImageFile.ImageFile) -> tuple[Image.Image, bool, str]:
    """The picture as its EXIF says; whether that turned it; what of it was left out, or ""."""
    try:
        orientation = file.getexif().get(_ORIENTATION, 1)
        # Pillow turns a TIFF as it reads it.
        orientation = getattr(file, "tag_v2", {}).get(_ORIENTATION, orientation)
        return ImageOps.exif_transpose(file), orientation in range(2, 9), ""
    except Exception:  # broken EXIF as well can raise anything
        return file.copy(), False, "EXIF, damaged"


def _read(data: bytes) -> Reading:
    if not data:
        raise _Undecodable("the file is empty")
    try:
        file, left_out = _whole(data)
        upright, turned, damaged = _upright(file)
        if file.format == "TGA" and not data[17] & 15:  # its fourth byte is not alpha
            upright = upright.convert("RGB")
        picture, scaled = eight_bits(upright, file, png_depth(data))
        converted = to_srgb(picture)
    except _Undecodable:
        raise
    except Exception as error:
        raise _Undecodable(_reason(error, data)) from error
    how = "; ".join(filter(None, (scaled, converted.how)))
    return Reading(
        converted.picture, file, how, bool(converted.how), turned, converted.unused,
        left_out or damaged,
    )  # fmt: skip


def _reason(error: Exception, data: bytes) -> str:
    # An address in memory would make equal problems different.
    text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    for name, beginning in _BEGINNINGS.items():
        if name not in _FORMATS and re.match(beginning, data[:512], re.DOTALL):
            suffixes, _ = _NOT_READ.get(name, ((), ""))
            return f"{text}: it is {_NAMED[suffixes[0]] if suffixes else name}"
    return text


def read(data: bytes, where: str) -> Reading:
    """The picture of a file, and what became of it on the way.

    Args:
        data: of the whole file.
        where: what the error names.

    Raises:
        DataError: it cannot be decoded, has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, or is
            of values that do not say what white is.
    """
    try:
        return _read(data)
    except _Undecodable as error:
        raise DataError(
            f"{where}: the picture cannot be read ({error}), repair or remove it"
        ) from error


def decode(data: bytes, where: str) -> Image.Image:
    """The picture alone, upright and in sRGB; of an animation the first frame. See ``read``."""
    return read(data, where).picture


def look(data: bytes) -> Facts:
    """The facts of a file, whatever it holds; decodes all of it, since a header proves nothing."""
    digest = hashlib.sha256(data).digest()
    try:
        found = _read(data)
    except _Undecodable as error:
        return Facts(digest, 0, 0, unreadable(str(error)))
    if found.how:  # so that what was made from its values as they stand is not taken for it
        digest = hashlib.sha256(digest + found.how.encode()).digest()
    return Facts(digest, found.picture.width, found.picture.height, "")
