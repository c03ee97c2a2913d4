"""What a collection holds, as one hash and as one list of texts, in columns: a million rows take
seconds and no objects of Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ldm.data.index import Captioned
from ldm.data.items import Items
from ldm.data.rows import Rows
from ldm.data.source import Source

_CHUNK = 8192  # rows
_TEXTS = pa.list_(pa.string())


class Content:
    """A hash over keys, captions and digests, the same however the rows are cut into batches."""

    def __init__(self) -> None:
        self._columns = [hashlib.sha256() for _ in range(6)]

    def add(self, source: Source, chosen: np.ndarray, settings: Any) -> None:
        """The rows of ``source`` for which ``chosen`` (bool, ``n``) is true, and what else tells
        it from others (anything with a repr).
        """
        self._columns[0].update(f"{int(chosen.sum())} {settings!r}\n".encode())
        first = 0
        for keys, captions, digests in _columns(source):
            mine = chosen[first : first + len(keys)]
            first += len(keys)
            if not mine.all():
                mask = pa.array(mine)
                keys, captions = keys.filter(mask), captions.filter(mask)
                digests = None if digests is None else digests.filter(mask)
            texts = captions.flatten()
            self._texts(1, keys)
            self._columns[3].update(pc.list_value_length(captions).to_numpy().tobytes())
            self._texts(4, texts)
            if digests is not None:
                raw = memoryview(digests.buffers()[1])
                at = digests.offset
                self._columns[0].update(raw[32 * at : 32 * (at + len(digests))])

    def _texts(self, column: int, texts: pa.StringArray) -> None:
        """Lengths and bytes of ``texts``, each into a hash of its own."""
        lengths = pc.binary_length(texts)
        self._columns[column].update(lengths.to_numpy(zero_copy_only=False).tobytes())
        _, ends, data = texts.buffers()
        if len(texts) and data is not None:
            found = np.frombuffer(ends, np.int32)
            first, last = found[texts.offset], found[texts.offset + len(texts)]
            self._columns[column + 1].update(memoryview(data)[first:last])

    def hexdigest(self) -> str:
        """Hex SHA-256 of all that was added."""
        return hashlib.sha256(b"".join(part.digest() for part in self._columns)).hexdigest()


def _columns(source: Source) -> Iterator[tuple[Any, Any, Any]]:
    """Keys, captions and digests in Arrow arrays; drawn pictures are told by their keys alone."""
    examples = source.examples
    if isinstance(examples, Rows):
        for table in examples.tables():
            yield table.column("key"), table.column("captions"), table.column("digest")
        return
    for first in range(0, len(examples), _CHUNK):
        some = examples[first : first + _CHUNK]
        captions = [example.captions for example in some]
        yield pa.array([example.key for example in some]), pa.array(captions, _TEXTS), None


class Captions(Sequence[str]):
    """Every caption that training can draw of ``items`` (as the files have it, where it varies
    endlessly), "" first and the others as they first come, without repeats.

    They are looked for when the first is asked for.
    """

    def __init__(self, items: Items) -> None:
        self._items = items

    @cached_property
    def _texts(self) -> pa.Array:
        found = [pa.array([""], pa.string())]
        for number, source in enumerate(self._items.sources):
            chosen = self._items.index[self._items.source == number]
            found += [pc.unique(texts) for texts in _drawable(source, chosen)]
        return pc.unique(pa.chunked_array(found))

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return self._texts[number].to_pylist()
        return self._texts[number].as_py()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            yield from self[first : first + _CHUNK]


def _drawable(source: Source, chosen: np.ndarray) -> Iterator[pa.Array]:
    """The texts that training can draw of the examples ``chosen`` (numbers, rising), in parts."""
    plain = isinstance(source, Captioned) and not source.grammar
    if plain and isinstance(source.examples, Rows):
        mask, first = np.zeros(len(source.examples), bool), 0
        mask[chosen] = True
        for table in source.examples.tables():
            mine = mask[first : first + len(table)]
            first += len(table)
            captions = table.column("captions")
            yield (captions if mine.all() else captions.filter(pa.array(mine))).flatten()
        return
    for first in range(0, len(chosen), _CHUNK):
        texts: list[str] = []
        for index in chosen[first : first + _CHUNK].tolist():
            known = source.captions(index)
            texts += source.examples[index].captions if known is None else known
        yield pa.array(texts, pa.string())
