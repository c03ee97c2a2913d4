"""Tables of captions beside pictures: ``metadata.jsonl``, ``.csv`` and ``.parquet``.

A row names a picture relative to the table's own folder, and has a text or a list of texts. Every
row comes out: with its captions, or with what is wrong with it.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeGuard

import pyarrow as pa
import pyarrow.parquet

from ldm.data.names import Root
from ldm.errors import DataError
from ldm.storage.json import JsonError, parse_json

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
Lines = Literal["first", "each", "joined"]
_NAMED = 8  # columns that a message shows
csv.field_size_limit(2**31 - 1)  # else a long caption would make its table unreadable


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


def spoken(text: str) -> str:
    """``text`` as one caption: white space is one space, and what has no visible character is "".

    Files hold lone byte-order marks and zero-width spaces that look like nothing.
    """
    text = " ".join(text.split())
    seen = any(unicodedata.category(c) not in ("Cc", "Cf") for c in text if c != " ")
    return text if seen else ""


def texts(value: object) -> tuple[str, ...] | None:
    """The captions of a cell, or None if it or a part of it is empty or no text."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    found = tuple(spoken(v) if is_text(v) else "" for v in values)
    return found if found and all(found) else None


def lines_of(text: str, lines: Lines) -> tuple[str, ...]:
    """The captions in a text file, empty lines left out.

    Args:
        text: all of it.
        lines: ``first`` is the first line, ``each`` every one, ``joined`` all as one caption.
    """
    if lines == "joined":
        every = [spoken(text)]
    else:
        every = [spoken(line) for line in text.split("\n")]
    found = tuple(line for line in every if line)
    return found[:1] if lines == "first" else found


def rows_of(
    root: Root, file: Path, table: str, image_column: str, caption_column: str
) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """The rows of a table: where it stands, the picture's key, captions, problem.

    Where there is a problem the key may be "".

    Args:
        root: the folder, and the pictures in it.
        file: the table.
        table: its path below the folder.
        image_column: of names of pictures, which count from the table's own folder.
        caption_column: of a text, or a list of texts.

    Raises:
        DataError: the table as a whole cannot be read; without its place.
    """
    options = {image_column: "data.image_column", caption_column: "data.caption_column"}
    folder = table[: -len(file.name)]
    for line, row in _lines(file):
        where = f"{table}:{line}"
        if isinstance(row, str):
            yield where, "", (), row
            continue
        name = row.get(image_column)
        named = name.strip() if is_text(name) else ""
        where += f" {name}" if named else ""
        key, wrong = root.find(folder, named) if named else ("", "")
        captions = texts(row.get(caption_column)) or ()
        lacking = next((column for column in options if column not in row), None)
        if lacking is not None:
            there = ", ".join(sorted(map(str, row))[:_NAMED]) + ", ..." * (len(row) > _NAMED)
            what = f"rows with no column {lacking!r} (but {there or 'nothing'})"
            wrong = f"{what}; write it, or set {options[lacking]}"
        elif not named:
            wrong = f"rows with no file name in {image_column!r}; name the picture"
        elif wrong:
            wrong = f"rows {wrong}"
        elif not captions:
            wrong = "rows whose caption is empty or no text; caption or remove them"
        yield where, key, captions, wrong


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
        raise DataError(f"line {reader.line_num} is not valid CSV ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file ({error})") from None
