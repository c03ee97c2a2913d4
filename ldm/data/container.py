"""What stands around the pixels in a picture file, kept from a decoder that it would stop.

Text, comments, thumbnails and preview pictures can be larger than the picture, damaged, or made to
take all memory. The pixels do not need them: ``bare`` leaves them out.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

MOST_SCANS = 500
"""Scans of a JPEG; libjpeg-turbo's own fuzzers stop there. Encoders make about ten."""
MOST_SCANNED = 2**32
"""Pixels over all scans of a JPEG, some seconds: every scan goes through all of the picture."""
LARGEST_PROFILE = 16 * 2**20
"""Bytes of a colour profile; those of printing presses reach 9 MB."""
_LARGEST_METADATA = 4 * 2**20  # bytes of all segments of a JPEG in front of its pixels
_LARGEST_EXIF = 2**20
_ORDINARY = 24  # scans of a JPEG that are not worth to be counted one by one

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_SCAN = b"\xff\xda"
# What follows 0xFF and is no marker with a length: pixels, restarts, fill bytes.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd8\x01])", re.DOTALL)


class Bare(NamedTuple):
    """A picture file without what its pixels do not need.

    Args:
        data: with EXIF, and in a JPEG the profile, if they are within bounds.
        profile: of a PNG; None: it has none, or none that can be read.
        cut: whether a profile was there and cannot be read.
    """

    data: bytes
    profile: bytes | None = None
    cut: bool = False


def bounded(data: bytes) -> bytes:
    """``data``; of a JPEG with more metadata than decoders take lightly, what its pixels need."""
    if not data.startswith(_JPEG):
        return data
    segments, end = _segments(data)
    return data if end <= _LARGEST_METADATA else _joined(segments, data[end:])


def bare(data: bytes) -> Bare | None:
    """``data`` without what its pixels do not need; None where nothing can be left out."""
    if data.startswith(_PNG):
        return _bare_png(data)
    if data.startswith(_JPEG):
        segments, end = _segments(data)
        left = _joined(segments, data[end:])
        return Bare(left) if len(left) < len(data) else None
    return None


def png_depth(data: bytes) -> int:
    """Bits of a channel or index of a PNG; 0 of all else."""
    return data[24] if data.startswith(_PNG) and len(data) > 24 else 0


def scans(data: bytes) -> int:
    """Scans of the first picture of a JPEG, up to ``MOST_SCANS`` + 1; of a few an upper bound; of
    all else 0.
    """
    if not data.startswith(_JPEG):
        return 0
    # In pixels 0xFF is followed by 0: besides scans only previews and the like are counted.
    if (most := data.count(_SCAN)) <= _ORDINARY:
        return most
    at, found = 2, 0
    while found <= MOST_SCANS and (marker := _MARKER.search(data, at)):
        if marker[1] == b"\xd9":  # the end; what follows is another picture
            break
        found += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return found


def _segments(data: bytes) -> tuple[list[bytes], int]:
    """The segments of a JPEG in front of its first scan, and where they end."""
    found, at = [], 2
    while (marker := _MARKER.match(data, at)) and marker[1] not in b"\xda\xd9":
        end = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
        if end > len(data):
            break
        found.append(data[at:end])
        at = end
    return found, at


def _joined(segments: list[bytes], rest: bytes) -> bytes:
    """A JPEG of those ``segments`` that say how its pixels are to be read, and which way is up."""
    kept, exif = [], False
    for segment in segments:
        kind, content = segment.lstrip(b"\xff")[0], segment.lstrip(b"\xff")[3:]
        named = 0xE0 <= kind <= 0xEF or kind == 0xFE
        profile = kind == 0xE2 and content.startswith(b"ICC_PROFILE\0")
        first = not exif and kind == 0xE1 and content.startswith(b"Exif\0\0")
        exif |= first
        if not named or profile or first or kind in (0xE0, 0xEE):  # JFIF; Adobe: how colours lie
            kept.append(segment)
    return b"".join((b"\xff\xd8", *kept, rest))


def _bare_png(data: bytes) -> Bare | None:
    kept, at = [_PNG], len(_PNG)
    profile, cut = None, False
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        whole = data[at : at + 12 + length]
        at += len(whole)
        content = whole[8:-4]
        if name == b"iCCP":
            profile = _inflated(content)
            cut = profile is None
        elif name == b"eXIf":
            sound = zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:])
            if sound and length <= _LARGEST_EXIF:
                kept.append(whole)
        elif name[:1].isupper() or name == b"tRNS":
            kept.append(whole)
    kept.append(data[at:])
    left = b"".join(kept)
    return Bare(left, profile, cut) if len(left) < len(data) else None


def _inflated(content: bytes) -> bytes | None:
    """The profile in a chunk of a PNG: its name, 0, the method 0, the profile deflated."""
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(content.partition(b"\0")[2][1:], LARGEST_PROFILE + 1)
    except zlib.error:
        return None
    return profile if inflater.eof and len(profile) <= LARGEST_PROFILE else None
