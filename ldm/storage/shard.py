"""Stacked rows in a safetensors file that are read one at a time, and known to be what was written.

    crc32(bytes of a row of the first column, of the second, ...)       columns by name
    crc32(all keys, names of the columns)

A row is read and not mapped: a page of a file that has become shorter meanwhile ends a process by
SIGBUS, where reading says so. Its sum is compared when a process first reads it: done every time it
would be a quarter of what the loader costs. The sums of all rows stand in the header's metadata,
that of the keys in front; in older files it is of the keys alone, and the oldest, which have no
metadata, are taken as they are.
"""

from __future__ import annotations

import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ldm.storage.json import JsonError, parse_json

KEYS = "keys"
"""The column that holds the keys, of 16 bytes each."""

_SUMS = "crc32"
_OPEN = 256  # files that a process keeps open
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_Count = Annotated[int, Field(ge=0, lt=2**53)]


class ShardError(ValueError):
    """A shard is not what was written; the message is a phrase."""


class _Entry(TypedDict):
    dtype: str
    shape: Annotated[list[_Count], Field(min_length=1)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _Column(NamedTuple):
    dtype: torch.dtype
    rows: int
    shape: list[int]  # of a row
    start: int
    size: int  # of a row, in bytes


class Shard:
    """The rows of ``file``, with their ``keys``, S16.

    Raises:
        ShardError: its header or its keys are not what was written.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        _forget(file)  # another may have had its name
        self._columns, metadata = _header(file)
        keys = self._columns.pop(KEYS, None)
        rows = {column.rows for column in self._columns.values()}
        if keys is None or keys.size != 16 or rows - {keys.rows}:
            raise ShardError("its rows do not belong together")
        self._sums = _sums(metadata[_SUMS], keys.rows) if _SUMS in metadata else None
        raw = _read(file, keys.start, keys.rows * 16)
        known = (_sum_of_keys(raw, self._columns), zlib.crc32(raw))
        if self._sums is not None and self._sums[0] not in known:
            raise ShardError("its keys are not what was written (their checksum differs)")
        self.keys = np.frombuffer(raw, "S16")
        self._unread = bytearray([self._sums is not None]) * keys.rows

    def empty(self, count: int) -> dict[str, Tensor]:
        """Room for so many rows, ``count ...`` by column."""
        columns = self._columns.items()
        return {name: torch.empty(count, *c.shape, dtype=c.dtype) for name, c in columns}

    def read(self, numbers: Sequence[int], into: Mapping[str, Tensor], at: Sequence[int]) -> None:
        """Reads the rows ``numbers`` into the rows ``at`` of ``into``, made by ``empty``.

        Raises:
            ShardError: they are not what was written, or not like those of ``into``.
            OSError: the file cannot be read any more.
        """
        alike = {name: (c.dtype, c.shape) for name, c in self._columns.items()}
        if alike != {name: (x.dtype, [*x.shape[1:]]) for name, x in into.items()}:
            raise ShardError("its entries are not like those of the files beside it")
        raw = {name: x.reshape(len(x), -1).view(torch.uint8).numpy() for name, x in into.items()}
        parts = [(raw[name], column.start, column.size) for name, column in self._columns.items()]
        read = _reader(self.file)
        for number, place in zip(numbers, at, strict=True):
            for rows, start, size in parts:
                _fill(rows[place], read, start + number * size)
            if self._unread[number]:
                total = 0
                for rows, *_ in parts:
                    total = zlib.crc32(rows[place], total)
                if total != self._sums[number + 1]:
                    raise ShardError("an entry is not what was written (its checksum differs)")
                self._unread[number] = False


def checksums(keys: np.ndarray, columns: Mapping[str, Tensor]) -> dict[str, str]:
    """What the metadata of a shard holds.

    Args:
        keys: S16, ``n``.
        columns: contiguous, on the CPU, ``n`` rows each.
    """
    sums = [_sum_of_keys(keys.tobytes(), columns)]
    raw = [column.reshape(len(keys), -1).view(torch.uint8) for _, column in sorted(columns.items())]
    for parts in zip(*raw, strict=True):
        total = 0
        for part in parts:
            total = zlib.crc32(part.numpy(), total)
        sums.append(total)
    return {_SUMS: np.array(sums, ">u4").tobytes().hex()}


def _sum_of_keys(raw: bytes, names: Iterable[str]) -> int:
    return zlib.crc32("\0".join(sorted(names)).encode(), zlib.crc32(raw))


def _sums(text: str, rows: int) -> np.ndarray:
    try:
        found = np.frombuffer(bytes.fromhex(text), ">u4")
    except ValueError:
        found = ()
    if len(found) != rows + 1:
        raise ShardError("its checksums are not what was written")
    return np.asarray(found)


def _header(file: Path) -> tuple[dict[str, _Column], dict[str, str]]:
    """Columns by name, in order, and the metadata."""
    size = file.stat().st_size
    length = int.from_bytes(_read(file, 0, min(size, 8)), "little")
    if size < 8 or length > size - 8:
        raise ShardError("it is shorter than its header says")
    try:
        found = parse_json(_read(file, 8, length), dict[str, _Entry | dict[str, str]])
    except JsonError as error:
        raise ShardError(f"its header is {error}") from None
    metadata = found.pop("__metadata__", {})
    # Every column is whole, and there is no metadata but the sums, under their name.
    if set(metadata) - {_SUMS} or not all("shape" in entry for entry in found.values()):
        raise ShardError("its header is not what was written")
    columns = {name: _column(entry, 8 + length, size) for name, entry in sorted(found.items())}
    return columns, metadata


def _column(entry: _Entry, start: int, end: int) -> _Column:
    """Where the rows of a column lie, in a file whose tensors lie between ``start`` and ``end``."""
    dtype = _DTYPES.get(entry["dtype"])
    rows, *shape = entry["shape"]
    first, last = entry["data_offsets"]
    size = math.prod(shape) * dtype.itemsize if dtype else 0
    if not size or last - first != rows * size or start + last > end:
        raise ShardError("its header is not what was written, or it has become shorter")
    assert dtype
    return _Column(dtype, rows, shape, start + first, size)


# -- files that stay open: opening one for every row would ask a network disk twice --

_open: OrderedDict[Path, int] = OrderedDict()


_Reader: TypeAlias = Callable[[Any, int], int]
"""(buffer, where it begins in the file) -> bytes that were read."""


def _read(file: Path, start: int, size: int) -> bytes:
    raw = np.empty(size, np.uint8)
    _fill(raw, _reader(file), start)
    return raw.tobytes()


def _fill(raw: np.ndarray, read: _Reader, start: int) -> None:
    """Reads ``raw``, uint8 ``n``, from ``start`` on."""
    done = read(raw, start)
    while done < len(raw) and (some := read(raw[done:], start + done)):
        done += some
    if done < len(raw):
        raise ShardError("it has become shorter")


def _reader(file: Path) -> _Reader:
    """What reads ``file`` until another is opened. Not from where a descriptor is: forked processes
    share that.
    """
    if not hasattr(os, "preadv"):  # Windows
        return partial(_read_of, file)
    if file not in _open:
        while len(_open) >= _OPEN:
            os.close(_open.popitem(last=False)[1])
        _open[file] = os.open(file, os.O_RDONLY)
    _open.move_to_end(file)
    descriptor = _open[file]
    return lambda buffer, start: os.preadv(descriptor, [buffer], start)


def _read_of(file: Path, buffer: Any, start: int) -> int:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.readinto(buffer)


def _forget(file: Path) -> None:
    if file in _open:
        os.close(_open.pop(file))
