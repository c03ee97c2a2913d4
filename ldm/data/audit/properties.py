"""What the decoded pictures of a source are like; kept by digest, so that it is asked only once.

The index says whether a picture can be read and how large it is. The traits say the rest: how the
file stores it (mode, frames, rotation, colour profile), and what training sees of it (a hash of the
pixels, and a look that similar pictures share).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image, ImageStat

from ldm.data.audit.perceptual_hash import look_of
from ldm.data.colour import declares_other
from ldm.data.images import flatten
from ldm.data.index import Indexed
from ldm.data.picture import HEIF, read
from ldm.data.source import Source
from ldm.progress import Progress
from ldm.storage.cache_root import cache_root
from ldm.storage.disk import atomic_write

log = logging.getLogger(__name__)

_FORMAT = 3  # raise it when the meaning of a column changes
_CHUNK = 512
_WHITE = (255, 255, 255)
_BLANK = 1.0  # levels of 255 that the colours of a blank picture deviate, where JPEG is its reason

_SCHEMA = pa.schema(
    [
        ("digest", pa.binary(32)),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("animated", pa.bool_()),
        ("turned", pa.bool_()),
        ("transparent", pa.bool_()),
        ("converted", pa.bool_()),
        ("profile", pa.string()),
        ("left_out", pa.string()),
        ("declared", pa.bool_()),
        ("blank", pa.bool_()),
        ("pixels", pa.binary(16)),
        ("bits", pa.uint64()),
        ("thumb", pa.binary(192)),
    ]
)


class Traits(NamedTuple):
    """What one picture is like; the columns of the tables.

    Args:
        format: Pillow's name of the file's format; "" of pictures drawn by code.
        mode: Pillow's name of how the file stores colours.
        animated: whether there are frames behind the first.
        turned: whether EXIF turns it.
        transparent: whether any pixel is not opaque.
        converted: whether its colours have a profile other than sRGB, which was applied.
        profile: why its profile is not used, or "".
        left_out: what of its file cannot be read besides pixels, or "".
        declared: whether it is a PNG that says, without a profile, that it is not sRGB.
        blank: whether it has a single colour.
        pixels: hash of the size and the upright RGB pixels over white: what training sees.
        bits: of its look, see ``ldm.data.audit.perceptual_hash``.
        thumb: of its look.
    """

    format: str
    mode: str
    animated: bool
    turned: bool
    transparent: bool
    converted: bool
    profile: str
    left_out: str
    declared: bool
    blank: bool
    pixels: bytes
    bits: int
    thumb: bytes


def traits_of(source: Source, digests: list[bytes]) -> pa.Table:
    """One row per example of ``source``, in order, with the columns of ``Traits``.

    What is new is decoded, in threads; what was found is kept below ``cache_root()`` even if that
    is cut short.

    Args:
        source: its ``load`` is called in several threads.
        digests: of its examples.

    Raises:
        DataError: a picture cannot be read any more.
    """
    about = f"{_FORMAT} {PIL.__version__} {HEIF} {source.name}"
    name = hashlib.sha256(about.encode(errors="backslashreplace")).hexdigest()[:24]
    file = cache_root() / "audit" / f"{name}.arrow"
    known = _read(file) if file.exists() else _SCHEMA.empty_table()
    have = set(known["digest"].to_pylist())
    new: dict[bytes, int] = {}
    for number, digest in enumerate(digests):
        if digest not in have:
            new.setdefault(digest, number)
    if new:
        batches: list[pa.RecordBatch] = known.to_batches()
        try:
            _examine(source, new, batches)
        finally:
            known = pa.Table.from_batches(batches, _SCHEMA)
            _write(known, file)
    row = {digest: number for number, digest in enumerate(known["digest"].to_pylist())}
    return known.take(np.array([row[digest] for digest in digests], np.int64))


def _examine(source: Source, new: dict[bytes, int], batches: list[pa.RecordBatch]) -> None:
    """Appends the traits of ``new``, digests and places in ``source``, to ``batches``."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(f"examining the pictures of {source.name}", "pictures", len(new)) as progress,
    ):
        todo = list(new.items())
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            found = pool.map(lambda entry: _traits(source, entry[1]), chunk)
            rows = [(digest, *traits) for (digest, _), traits in zip(chunk, found, strict=True)]
            columns = [list(column) for column in zip(*rows, strict=True)]
            batches.append(pa.RecordBatch.from_arrays(_arrays(columns), schema=_SCHEMA))
            progress.advance(len(chunk))


def _arrays(columns: Iterable[list]) -> list[pa.Array]:
    return [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]


def _read(file: Path) -> pa.Table:
    try:
        with pa.ipc.open_file(file.read_bytes()) as reader:
            if reader.schema == _SCHEMA:
                return reader.read_all()
    except (OSError, pa.ArrowException) as error:
        log.warning("%s cannot be read and is made anew: %s", file, error)
    return _SCHEMA.empty_table()


def _write(table: pa.Table, file: Path) -> None:
    with atomic_write(file) as partial, pa.ipc.new_file(str(partial), _SCHEMA) as writer:
        writer.write_table(table)


def _traits(source: Source, index: int) -> Traits:
    kept, animated, turned, converted, profile, left_out, declared = "", *[False] * 3, "", "", False
    if isinstance(source, Indexed):
        found = read(source.file(index), source.where(source.examples.key(index)))
        image, file, turned = found.picture, found.file, found.turned
        kept, mode = file.format or "", file.mode
        # The further pictures in a photograph of a telephone are previews.
        animated = kept != "MPO" and bool(getattr(file, "is_animated", False))
        converted, profile, left_out = found.converted, found.profile, found.left_out
        declared = kept == "PNG" and declares_other(file.info)
    else:
        image = source.load(index)
        mode = image.mode
    transparent = image.has_transparency_data and _see_through(image)
    rgb = flatten(image, _WHITE)
    pixels = hashlib.blake2b(f"{rgb.size}".encode(), digest_size=16)
    pixels.update(rgb.tobytes())
    blank = max(ImageStat.Stat(rgb).stddev) < _BLANK
    look = look_of(rgb)
    return Traits(
        kept, mode, animated, turned, transparent, converted, profile, left_out, declared, blank,
        pixels.digest(), *look,
    )  # fmt: skip


def _see_through(image: Image.Image) -> bool:
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return isinstance(lowest, (int, float)) and lowest < 255
