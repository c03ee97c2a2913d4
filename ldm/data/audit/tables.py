"""A table of captions without some of its rows; what is left of a text stays as it is."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet


def without(file: Path, numbers: set[int]) -> bytes:
    """The bytes of ``metadata.jsonl``, ``.csv`` or ``.parquet`` without rows.

    Args:
        file: that can be read.
        numbers: of rows, as ``ldm.data.metadata.rows_of`` has them: lines of a jsonl, last lines of
            records of a csv, rows from 1 of a parquet.
    """
    if file.suffix == ".parquet":
        table = pyarrow.parquet.read_table(file)
        keep = ~np.isin(np.arange(1, len(table) + 1), list(numbers))
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table.filter(pa.array(keep)), sink)
        return sink.getvalue()
    text = file.read_bytes().decode()
    if file.suffix == ".csv":
        return _csv(text, numbers).encode()
    # Lines end where reading has them end: at a lone \r too, and at no U+2028.
    lines = io.StringIO(text, newline="")
    return "".join(line for n, line in enumerate(lines, 1) if n not in numbers).encode()


def _csv(text: str, numbers: set[int]) -> str:
    """A record may go over several lines: it ends where the reader stands behind it."""
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    kept, start = [], 0
    for _ in reader:
        stop = reader.line_num
        if stop not in numbers:
            kept += lines[start:stop]
        start = stop
    return "".join(kept)
