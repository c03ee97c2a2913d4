"""``parquet``: pictures and captions in the columns of parquet files.

The picture column is what ``datasets`` writes, ``struct{bytes, path}``, or plain binary. A picture
is found by its row group and its place there: one row group of that one column is read, and the
last ones are kept, so that a run which goes through a file in order reads each once. In random
order every picture costs a row group; a log line says so where they are large, and ``order.window``
of the run makes it a few of them at a time.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.captions import Grammar
from ldm.data.files import Files
from ldm.data.hints import Hints
from ldm.data.index import Part, state_of
from ldm.data.metadata import texts
from ldm.data.names import as_stored, of_windows
from ldm.data.place import AtPath, Place, counted
from ldm.data.ranges import Share, Weight
from ldm.data.rows import Row
from ldm.data.tar import TARS
from ldm.errors import DataError

log = logging.getLogger(__name__)

_LISTED = 2  # how rows are told from a file: raise it when the same file becomes other rows
_LARGE = 64 * 2**20  # bytes of a row group from which on random access is worth a warning


class _Groups:
    """The last row groups that were read, up to ``limit`` bytes; for all threads of a process."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int, str], pa.ChunkedArray] = OrderedDict()

    def column(self, file: Path, group: int, name: str) -> pa.ChunkedArray:
        """Column ``name`` of a row group. Raises ``DataError`` if it cannot be read."""
        key = (str(file), file.stat().st_mtime_ns, group, name)
        with self._lock:  # also while reading: threads that want the same group wait for it
            if key not in self._kept:
                try:
                    with pq.ParquetFile(file, memory_map=True) as opened:
                        table = opened.read_row_group(group, [name], use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    raise DataError("its row group in the parquet file is damaged") from error
                self._kept[key] = table.column(name)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)
            return self._kept[key]


_groups = _Groups(256 * 2**20)


@dataclass(frozen=True)
class TableData(AtPath, Files):
    """Captioned pictures in local parquet files; the config *is* the source.

    The key of a picture is ``file.parquet:row``, rows counted from 1.

    Args:
        path: a parquet file, a folder of them, or a pattern (``train-*.parquet``).
        image_column: where the pictures are: ``struct{bytes, path}`` or binary. A path without
            bytes is a file in the folder of its parquet file, or below it.
        caption_column: where the captions are: a text, or a list of texts.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: what becomes of a caption at every use; None: nothing.
        weight: share of the draws against other sources'; None: its number of pictures.
        hint_column: where the pictures are that a ControlNet learns to follow, as
            ``image_column`` has the others (``conditioning_image``); None: there are none.
    """

    path: str
    kind: Literal["parquet"] = "parquet"
    image_column: str = "image"
    caption_column: str = "text"
    held_out_fraction: Share = 0.05
    grammar: Grammar | None = None
    weight: Weight | None = None
    hint_column: str | None = None

    suffix: ClassVar[str] = ".parquet"
    endings: ClassVar[tuple[str, ...]] = (suffix,)
    contents: ClassVar[str] = "parquet files"

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """A parquet file, or a folder with some that are not captions of other files."""
        if place.folder is None:
            return super().recognises(place)
        # img2dataset writes a table of addresses beside each tar.
        beside = {name.split(".tar")[0] for name in place.ending(*TARS)}
        mine = [
            name
            for name in place.ending(cls.suffix)
            if name not in place.tables and name[: -len(cls.suffix)] not in beside
        ]
        return counted(cls.contents, mine)

    @cached_property
    def beside(self) -> Hints | None:
        """The hints, if there are some: the same rows with another picture."""
        return of_column(self)

    @cached_property
    def shards(self) -> np.ndarray:
        """Number of the row group, over all files, that each picture is in, ``n``."""
        new = np.diff(self.examples.parts(), prepend=0) != 0
        new |= np.diff(self.examples.column("a"), prepend=0) != 0
        return np.cumsum(new)

    def _part(self, file: Path, name: str) -> Part:
        return Part(
            path=str(file.resolve()),
            settings=f"parquet {_LISTED} {name} {self.image_column} {self.caption_column}",
            files=itertools.chain([state_of(file)], _beside(file, self.image_column)),
            rows=partial(self._rows, file, name),
            read=partial(_read, file, self.image_column),
        )

    def _rows(self, file: Path, name: str) -> Iterator[Row]:
        """A row per row of the file; only captions are read."""
        try:
            opened = pq.ParquetFile(file)
        except (pa.ArrowException, OSError):
            log.debug("%s", file, exc_info=True)
            wrong = "parquet files that are cut off or damaged; copy them again"
            yield Row(name, (), problem=wrong)
            return
        with opened:
            try:
                self._check(file, opened.schema_arrow)
            except DataError as error:
                if len(self._found[1]) == 1:
                    raise
                reason = str(error).removeprefix(f"{file}: ")
                wrong = f"parquet files without the columns ({reason}); or move them away"
                yield Row(name, (), problem=wrong)
                return
            groups = [opened.metadata.row_group(n) for n in range(opened.num_row_groups)]
            largest = max((group.total_byte_size for group in groups), default=0)
            if largest > _LARGE:
                log.warning(
                    "%s: row groups of %d MB, in random order each is read for one picture; "
                    "set order.window, or write smaller ones", file, largest >> 20,
                )  # fmt: skip
            number = 0
            for group, about in enumerate(groups):
                for place, captions, wrong in self._captions(opened, group, about.num_rows):
                    number += 1
                    yield Row(f"{name}:{number}", captions, (group, place, 0), wrong)

    def _captions(
        self, opened: pq.ParquetFile, group: int, rows: int
    ) -> Iterator[tuple[int, tuple[str, ...], str]]:
        """Place in the group, captions, problem."""
        place = 0
        try:
            for batch in opened.iter_batches(1024, [group], [self.caption_column]):
                for cell in batch.column(0):
                    yield place, *captions_of(cell)
                    place += 1
        except (pa.ArrowException, OSError):
            log.debug("row group %d", group, exc_info=True)
            wrong = "rows in a damaged part of their file; copy it again"
            yield from ((rest, (), wrong) for rest in range(place, rows))

    def _check(self, file: Path, schema: pa.Schema) -> None:
        for column in (self.image_column, self.caption_column):
            if column not in schema.names:
                raise DataError(
                    f"{file}: no column {column!r} among {schema.names}, "
                    "set data.image_column or data.caption_column"
                )
        kind = schema.field(self.image_column).type
        if not (binary(kind) or (pa.types.is_struct(kind) and "bytes" in kind.names)):
            raise DataError(
                f"{file}: column {self.image_column!r} holds {kind}, not the bytes of pictures; "
                "set data.image_column (for names of picture files: metadata.parquet in a folder)"
            )


def of_column(source: Any) -> Hints | None:
    """The hints of a ``source`` of rows whose ``hint_column`` has them; None: it has none.

    Raises:
        DataError: there is no such column.
    """
    column = source.hint_column
    if column is None:
        return None
    other = replace(source, image_column=column, hint_column=None)
    name = f"{source.name}, column {column!r},"
    try:
        return Hints(name, other.parts, lambda key: f"{other.where(key)}, column {column!r}")
    except DataError as error:  # which takes the column for that of the pictures
        raise DataError(f"data.hint_column {column!r}: {error}") from error


def binary(kind: pa.DataType) -> bool:
    """Whether a column of type ``kind`` holds bytes."""
    is_ = pa.types
    return is_.is_binary(kind) or is_.is_large_binary(kind) or is_.is_binary_view(kind)


def captions_of(cell: pa.Scalar) -> tuple[tuple[str, ...], str]:
    """The captions of a cell, and what is wrong with it or ""."""
    try:
        captions = texts(cell.as_py())
    except UnicodeDecodeError:
        return (), "rows whose caption is not UTF-8; write them anew"
    if captions is None:
        return (), "rows whose caption is empty or no text; caption or remove them"
    return captions, ""


def picture_of(cell: Any, folders: Sequence[Path]) -> bytes:
    """The bytes of a cell: itself, or ``bytes`` or else ``path`` of a struct.

    Args:
        cell: bytes, ``{bytes, path}`` or None.
        folders: where the path may lead; a relative one counts from the first that has it.

    Raises:
        DataError: there are none, or the path leads out of the folders; without a place.
        OSError: the file cannot be read.
    """
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is not None:
        return data
    if not path:
        raise DataError("the row has none")
    if of_windows(path):
        raise DataError("its path is one of Windows: write it from the folder of its file, with /")
    inside = [file for folder in folders if (file := _inside(folder, path))]
    if not inside:
        raise DataError("its path leads out of the folder of the data")
    return next((file for file in inside if file.exists()), inside[0]).read_bytes()


def _inside(folder: Path, path: str) -> Path | None:
    """``path`` counted from ``folder``, or None if it leads out of it."""
    file = (folder / as_stored(Path(path), folder)).resolve()
    return file if file.is_relative_to(folder.resolve()) else None


def _read(file: Path, column: str, row: Row) -> bytes:
    group, place, _ = row.place
    return picture_of(_groups.column(file, group, column)[place].as_py(), [file.parent])


def _beside(file: Path, column: str) -> Iterator[tuple[str, int, int]]:
    """States of the files that rows without bytes name: the index depends on them too."""
    try:
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                leaves = [about.column(n) for n in range(about.num_columns)]
                counts = {leaf.path_in_schema: leaf.statistics for leaf in leaves}
                data = counts.get(f"{column}.bytes")
                if f"{column}.path" not in counts or (
                    data and data.has_null_count and not data.null_count
                ):
                    continue
                table = opened.read_row_group(group, [f"{column}.path"])
                for cell in table.column(column).to_pylist():
                    found = _inside(file.parent, (cell or {}).get("path") or "")
                    if found and found.is_file():
                        yield state_of(found)
    except (pa.ArrowException, OSError):
        log.debug("%s", file, exc_info=True)  # what is wrong with it becomes a problem of its row
