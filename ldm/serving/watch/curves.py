"""The numbers of ``metrics.jsonl``: read once, from where the last look ended, and drawn in few
points.

A file of a million lines takes seconds to read. A look takes a fixed part of one: it goes on where
the one before has ended, and tells of what lies behind that from lines all over it, until a later
look has come to the end. From then on every number is exact.
"""

from __future__ import annotations

import io
import os
import time
from collections import defaultdict
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from ldm.storage.json import JsonError, parse_json

X = "images"
_PATIENCE = 0.25  # seconds of reading at a look
_BLOCK = 1 << 21  # bytes that are read at a time
_WINDOWS, _WINDOW = 300, 1 << 13  # lines from all over what is not read yet, and bytes of each
_SMALL = 1 << 22  # bytes that are read at once, whatever it takes
_MARK = 64  # bytes that tell whether what was read is still there
_LOOKS = 64  # looks whose ends are remembered
_KEYS = 2000
Columns = dict[str, tuple[np.ndarray, np.ndarray]]


class Curves:
    """The numbers of one file; any thread may look.

    Args:
        file: need not be there.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, Lock()
        self._number = 0  # of readings from the start: a run that goes on cuts its file
        self._forget()

    def _forget(self) -> None:
        self._number += 1
        self._inode, self._offset, self._mark = 0, 0, b""
        self._found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self._ends: dict[str, dict[str, int]] = {}

    def look(self, points: int, after: str = "") -> dict[str, Any]:
        """The numbers as plain types. ``curves``: of every key ``x`` (images) and ``y``; where
        there are more than ``points`` of them, ``low`` and ``high`` as well, and ``y`` is the mean
        of a stretch of images. ``after`` is what the last look said as ``end``: where it can, the
        answer then has only what has come since, and ``whole`` is false.

        Args:
            points: of a curve at most.
            after: "" for all of it.
        """
        with self._lock:
            try:
                with self._file.open("rb", buffering=0) as file:
                    size, ahead = self._read(file)
            except FileNotFoundError:
                self._forget()
                size, ahead = 0, {}
            return self._told(points, after, size, ahead)

    def _read(self, file: BinaryIO) -> tuple[int, Columns]:
        """Goes on reading; the size of the file, and numbers from what is not read yet."""
        size, inode = file.seek(0, io.SEEK_END), _inode(file)
        mark = _at(file, max(0, self._offset - _MARK), self._offset)
        if inode != self._inode or size < self._offset or mark != self._mark:
            self._forget()
            self._inode = inode
        until = time.monotonic() + _PATIENCE
        while self._offset < size:
            data = _at(file, self._offset, min(size, self._offset + _BLOCK))
            whole = data[: data.rfind(b"\n") + 1]
            if not whole:  # a line that is being written, or is none
                break
            self._offset += len(whole)
            self._mark = (self._mark + whole[-_MARK:])[-_MARK:]
            for key, pair in _parsed(whole).items():
                if key in self._found or len(self._found) < _KEYS:
                    self._found[key].append(pair)
            if size - self._offset > _SMALL and time.monotonic() > until:
                return size, self._ahead(file, size)
        return size, {}

    def _ahead(self, file: BinaryIO, size: int) -> Columns:
        starts = np.linspace(self._offset, size - _WINDOW, _WINDOWS).astype(int).tolist()
        parts = [_at(file, start, start + _WINDOW) for start in starts]
        lines = [part[part.find(b"\n") + 1 : part.rfind(b"\n") + 1] for part in parts]
        return _parsed(b"".join(lines))

    def _told(self, points: int, after: str, size: int, ahead: Columns) -> dict[str, Any]:
        every: Columns = {}
        for key, parts in self._found.items():
            if len(parts) > 1:
                parts[:] = [tuple(np.concatenate(column) for column in zip(*parts, strict=True))]  # type: ignore[misc]
            every[key] = parts[0]
        known = {key: len(x) for key, (x, _) in every.items()}
        end, since = f"{self._number}.{self._offset}", self._ends.get(after)
        self._ends[end] = known
        while len(self._ends) > _LOOKS:
            del self._ends[next(iter(self._ends))]
        more = sum(known.values()) - sum(since.values()) if since else 0
        whole = since is None or bool(ahead) or more > points
        if not whole and since is not None:
            new = {key: since.get(key, 0) for key in every if known[key] > since.get(key, 0)}
            every = {key: (every[key][0][n:], every[key][1][n:]) for key, n in new.items()}
        for key, (x, y) in ahead.items():
            before = every.get(key, (x[:0], y[:0]))
            every[key] = np.concatenate([before[0], x]), np.concatenate([before[1], y])
        return {
            "end": "" if ahead else end,
            "whole": whole,
            "read": 1.0 if not ahead else round(self._offset / size, 4),
            "curves": {key: thinned(x, y, points) for key, (x, y) in every.items()},
        }


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> dict[str, list[float]]:
    """A curve in at most ``points`` stretches of ``x``, each with its least, greatest and mean
    ``y`` at its last ``x``; as it is where it has no more points than that.
    """
    if len(x) <= points:
        return {"x": x.tolist(), "y": y.tolist()}
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    width = (x[-1] - x[0]) / points or 1.0
    place = np.minimum(((x - x[0]) / width).astype(int), points - 1)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    count = np.diff(first, append=len(x))
    return {
        "x": x[first + count - 1].tolist(),
        "y": (np.add.reduceat(y, first) / count).tolist(),
        "low": np.minimum.reduceat(y, first).tolist(),
        "high": np.maximum.reduceat(y, first).tolist(),
    }


def last(file: Path, *keys: str) -> dict[str, float]:
    """The last number of each of ``keys`` in the end of ``file``, as far as there is one."""
    found: dict[str, float] = {}
    try:
        with file.open("rb", buffering=0) as opened:
            size = opened.seek(0, io.SEEK_END)
            data = _at(opened, max(0, size - 8 * _WINDOW), size)
    except FileNotFoundError:
        return found
    if size > 8 * _WINDOW:
        data = data[data.find(b"\n") + 1 :]
    for key, (_, y) in _parsed(data[: data.rfind(b"\n") + 1]).items():
        if key in keys:
            found[key] = float(y[-1])
    return found


def _at(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(max(0, stop - start))


def _inode(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino


def _parsed(lines: bytes) -> Columns:
    """The finite numbers of whole lines, by key, each with the images where it stands."""
    if not lines.strip():
        return {}
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=max(len(lines), 1 << 16))
    try:
        table = pyarrow.json.read_json(pa.BufferReader(lines), read_options=options)
    except pa.ArrowInvalid:  # a damaged line, or one key with values of several kinds
        return _one_by_one(lines)
    if X not in table.column_names or not _number(table.schema.field(X).type):
        return _one_by_one(lines)
    x = _values(table.column(X))
    found: Columns = {}
    for name in dict.fromkeys(table.column_names):
        if table.column_names.count(name) == 1 and _number(table.schema.field(name).type):
            y = _values(table.column(name))
            good = np.isfinite(x) & np.isfinite(y)
            if good.all():
                found[name] = x, y
            elif good.any():
                found[name] = x[good], y[good]
    return found


def _number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """float64, a missing value as nan."""
    return pc.cast(column, pa.float64(), safe=False).to_numpy()


def _one_by_one(lines: bytes) -> Columns:
    listed: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for line in lines.split(b"\n"):
        try:
            told = parse_json(line, dict[str, Any])
        except JsonError:
            continue  # cut short by a kill: the run drops it when it goes on
        numbers = {key: v for key, v in told.items() if type(v) in (int, float) and abs(v) < 1e300}
        if X in numbers:
            for key, value in numbers.items():
                listed[key][0].append(float(numbers[X]))
                listed[key][1].append(float(value))
    return {key: (np.array(x), np.array(y)) for key, (x, y) in listed.items()}
