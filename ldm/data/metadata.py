"""Tables of captions beside pictures: ``metadata.jsonl``, ``.csv`` and ``.parquet``.

A row names a picture relative to the table's own folder, and has a text or a list of texts. Every
row comes out: with its captions, or with what is wrong with it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.parquet

from ldm.data.source import DataError
from ldm.storage.json import JsonError, parse_json

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_text(file: Path) -> str:
    """The text of ``file``. Raises ``DataError`` if it is not UTF-8 or cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not UTF-8, save the file as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def is_text(value: object) -> TypeGuard[str]:
    """Whether it can be written as UTF-8: JSON escapes can name half a character, and a file name
    can be any bytes.
    """
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def texts(value: object) -> tuple[str, ...] | None:
    """The captions of a cell, or None if it or a part of it is empty or no text."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    found = tuple(" ".join(v.split()) if is_text(v) else "" for v in values)
    return found if found and all(found) else None


def rows_of(
    root: Path, table: str, image_column: str, caption_column: str
) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """The rows of the file ``root/table``: where it stands, the picture's key, captions, problem.

    The key is the path below ``root``; where there is a problem it may be "".

    Raises:
        DataError: the table as a whole cannot be read, or lacks a column.
    """
    for line, row in _lines(root / table):
        where = f"{table}:{line}"
        if isinstance(row, str):
            yield where, "", (), row
            continue
        for column in (image_column, caption_column):
            if column not in row:
                raise DataError(
                    f"{root / where}: no column {column!r} among {sorted(row)}, "
                    "set data.image_column or data.caption_column"
                )
        name = row[image_column]
        if not is_text(name) or not name.strip():
            yield where, "", (), f"rows with no file name in {image_column!r}; name the picture"
            continue
        key = Path(os.path.normpath(Path(table).parent / name.strip())).as_posix()
        captions = texts(row[caption_column])
        if key.startswith("../") or Path(name.strip()).is_absolute():
            wrong = "rows that point out of the folder; move the pictures into it"
            yield f"{where} {name}", "", (), wrong
        elif captions is None:
            wrong = "rows whose caption is empty or no text; caption or remove them"
            yield f"{where} {name}", key, (), wrong
        else:
            yield f"{where} {name}", key, captions, ""


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number (of a parquet: row number from 1) and columns, or what is wrong with the line."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".csv":
        yield from _csv(file)
    else:
        # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for ends.
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                yield number, _json(line)


def _json(line: str) -> dict[str, Any] | str:
    cure = 'write one {"file_name": ..., "text": ...} a line'
    try:
        return parse_json(line, dict[str, Any])
    except JsonError as error:
        return f"lines that are {error}; {cure}"


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                cure = 'put captions with a comma into "quotes"'
                yield reader.line_num, f"lines with more columns than the header; {cure}"
            else:
                yield reader.line_num, row
    except csv.Error as error:  # where the next line begins is not known any more
        raise DataError(f"{file}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from None
