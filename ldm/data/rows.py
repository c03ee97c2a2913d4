"""Examples in columns: a million of them are a memory-mapped table, not a million objects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ldm.data.source import Example, Problem, in_fractions
from ldm.errors import DataError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique and stable within its source
        ("captions", pa.list_(pa.string())),
        ("a", pa.int64()),  # where the picture lies: what the three mean is the source's affair
        ("b", pa.int64()),
        ("c", pa.int64()),
        ("digest", pa.binary(32)),  # SHA-256 of the picture file
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("problem", pa.string()),  # why the row cannot be trained on, or ""
    ]
)


class Row(NamedTuple):
    """What a layout says about one picture before its bytes are looked at.

    Args:
        key: unique and stable within its source, also what errors name (a relative path).
        captions: at least one, unless there is a problem.
        place: where the picture lies: three numbers that only its source understands.
        problem: a phrase that says what is wrong and what to do ("has no caption, ..."), or "".
    """

    key: str
    captions: tuple[str, ...]
    place: tuple[int, int, int] = (0, 0, 0)
    problem: str = ""


class Mapped(NamedTuple):
    """A table in memory-mapped pages of a file.

    Args:
        table: of ``SCHEMA``.
        file: where it is; None if it has no name any more.
    """

    table: pa.Table
    file: Path | None

    @staticmethod
    def open(file: Path) -> Mapped:
        """Maps ``file``. Raises ``OSError`` or ``pa.ArrowInvalid``."""
        return Mapped(pa.ipc.open_file(pa.memory_map(str(file))).read_all(), file)


def _mapped(files: Sequence[Path | pa.Table], fraction: float, held_out: bytes | None) -> Rows:
    """What ``Rows.__reduce__`` took apart."""
    try:
        tables = [Mapped.open(f) if isinstance(f, Path) else Mapped(f, None) for f in files]
    except OSError as error:
        raise DataError(
            f"{error.filename or files[0]}: the index of the data was replaced while the run"
            " started, start it again"
        ) from error
    rows = Rows(tables, fraction)
    if held_out is not None:
        bits = np.frombuffer(held_out, np.uint8)
        vars(rows)["held_out"] = np.unpackbits(bits, count=len(rows)).astype(bool)
    return rows


class Rows(Sequence[Example]):
    """The good rows of tables of ``SCHEMA``, as a sequence of examples; the others are
    ``problems``.

    Args:
        tables: one a file of the source (or one in all), in order.
        held_out_fraction: share held out, chosen by the hash of a picture's bytes, so that a copy
            of a held-out picture is held out as well.
    """

    def __init__(self, tables: Sequence[Mapped], held_out_fraction: float) -> None:
        good, self.problems, self.part = [], list[Problem](), list[int]()
        # What another process opens; a table whose file is gone it gets as it is.
        self._files = [table if file is None else file for table, file in tables]
        for number, (table, _) in enumerate(tables):
            for batch in table.to_batches():
                fine = pc.equal(batch.column("problem"), "")
                if fine.true_count < len(batch):  # what is filtered is copied out of the map
                    bad = batch.filter(pc.invert(fine)).select(["key", "problem"])
                    self.problems += [Problem(r["key"], r["problem"]) for r in bad.to_pylist()]
                    batch = batch.filter(fine)
                if len(batch):
                    good.append(batch)
                    self.part.append(number)
        self._batches = good
        self._columns = [dict(zip(b.schema.names, b.columns, strict=True)) for b in good]
        self._starts = np.cumsum([0, *map(len, good)])
        self._edges: list[int] = self._starts.tolist()
        self._fraction = held_out_fraction

    def __reduce__(self) -> tuple[Any, ...]:
        """Where the tables are, for another process to map them as well."""
        known = vars(self).get("held_out")
        held_out = None if known is None else np.packbits(known).tobytes()
        return _mapped, (self._files, self._fraction, held_out)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, row = self._find(index)
        key, captions = (self._columns[batch][name][row].as_py() for name in ("key", "captions"))
        return Example(key, tuple(captions), bool(self.held_out[index]))

    def _find(self, index: int) -> tuple[int, int]:
        """Number of the batch that row ``index`` is in, and its place there."""
        count = self._edges[-1]
        if not -count <= index < count:
            raise IndexError(index)
        index %= count
        batch = bisect_right(self._edges, index) - 1
        return batch, index - self._edges[batch]

    def _cell(self, column: str, index: int):
        batch, row = self._find(index)
        return self._columns[batch][column][row].as_py()

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, ``n``."""
        if not self._batches:
            return np.empty(0)
        return np.concatenate([b.column(name).to_numpy() for b in self._batches])

    def parts(self) -> np.ndarray:
        """Number of the table that each row came from, ascending, int32 ``n``."""
        lengths = [len(batch) for batch in self._batches]
        return np.repeat(np.array(self.part, np.int32), lengths)

    def place(self, index: int) -> tuple[int, tuple[int, int, int]]:
        """Number of the table that row ``index`` came from, and where its picture lies."""
        batch, row = self._find(index)
        columns = self._batches[batch]
        a, b, c = (columns.column(name)[row].as_py() for name in "abc")
        return self.part[batch], (a, b, c)

    def key(self, index: int) -> str:
        """Key of row ``index``."""
        return self._cell("key", index)

    def digest(self, index: int) -> str:
        """Hex SHA-256 of the bytes of the picture file."""
        return self._cell("digest", index).hex()

    @property
    def digests(self) -> np.ndarray:
        """``digest`` of every row as bytes, uint8 ``n 32``; a copy, made anew each time."""
        found = np.empty((len(self), 32), np.uint8)
        for first, batch in zip(self._starts, self._batches, strict=False):
            found[first : first + len(batch)] = _digests(batch)
        return found

    def tables(self) -> Iterator[pa.RecordBatch]:
        """All rows, in order, as they lie in the index."""
        yield from self._batches

    def scan(self) -> Iterator[tuple[str, tuple[str, ...], bytes]]:
        """Key, captions and digest of every row, in order; much faster than one by one."""
        for batch in self._batches:
            columns = [batch.column(name).to_pylist() for name in ("key", "captions", "digest")]
            for key, captions, digest in zip(*columns, strict=True):
                yield key, tuple(captions), digest

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, int32 ``n 2``."""
        return np.stack([self.column("width"), self.column("height")], 1).astype(np.int32)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Whether each is never trained on, bool ``n``."""
        found = np.zeros(len(self), bool)
        if self._fraction:
            for first, batch in zip(self._starts, self._batches, strict=False):
                text = _digests(batch).tobytes().hex().encode()
                # One name in all layouts: the same picture is held out in each.
                names = (b"folder " + text[n : n + 64] for n in range(0, len(text), 64))
                found[first : first + len(batch)] = in_fractions(names, self._fraction)
        return found


def _digests(batch: pa.RecordBatch) -> np.ndarray:
    """Uint8 ``n 32``, as it lies in the index: objects of Python would take four times as much."""
    column = batch.column("digest")
    raw = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 32)
    return raw[column.offset : column.offset + len(column)]
