"""The index of a collection: one look at every picture, kept until a file changes.

Reading a million pictures to hash, measure and check them takes long; so what was found is kept in
Arrow files, one for every *part* of a source (a folder of pictures, a tar, a table), under a name
that depends on everything the part depends on: its path, the sizes and times of its files, the
settings of the layout. A part that has changed has another name; pictures of it that have not are
not looked at again.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

from ldm.data.captions import Grammar
from ldm.data.picture import HEIF, Facts, decode, look, unreadable
from ldm.data.rows import SCHEMA, Mapped, Row, Rows
from ldm.data.source import Example, Problem
from ldm.diffusion import stream
from ldm.errors import DataError
from ldm.progress import Progress
from ldm.storage.cache_root import cache_root

log = logging.getLogger(__name__)

_FORMAT = 3  # raise it when the meaning of a column changes
_CHUNK = 512
_FACTS = ("key", "a", "b", "c", "digest", "width", "height", "problem")


@dataclass(frozen=True)
class Part:
    """A file or a folder that is indexed as a whole.

    Args:
        path: absolute, of the file or folder.
        settings: whatever else its rows depend on, as text.
        files: (name, bytes, time of change in ns) of every file that its rows come from.
        rows: lists it; called only if there is no index of this state.
        read: bytes of the picture of a row. Raises ``OSError``, or ``DataError`` with the reason
            alone: which picture it is, is known here.
        reusable: whether ``place`` of an equal key is another one where the picture has changed,
            so that the facts of an older index still hold where key and place are the same.
    """

    path: str
    settings: str
    files: Iterable[tuple[str, int, int]]
    rows: Callable[[], Iterable[Row]]
    read: Callable[[Row], bytes]
    reusable: bool = False


def state_of(path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of change of a file, as ``Part.files`` wants them."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def index(part: Part) -> Mapped:
    """The table of ``part``, ``ldm.data.rows.SCHEMA``, memory-mapped; made if it is not there."""
    about = f"{_FORMAT} {PIL.__version__} {HEIF} {Image.MAX_IMAGE_PIXELS} {part.settings}"
    lineage = hashlib.sha256(f"{about} {part.path}".encode()).hexdigest()[:24]
    digest = hashlib.sha256(lineage.encode())
    for entry in part.files:
        digest.update(repr(entry).encode())
    folder = cache_root() / "index"
    file = folder / f"{lineage}-{digest.hexdigest()[:24]}.arrow"
    if file.exists():
        try:
            return Mapped.open(file)
        except (OSError, pa.ArrowInvalid) as error:
            log.warning("%s cannot be read and is made anew: %s", file, error)
    older = [old for old in folder.glob(f"{lineage}-*.arrow") if old != file]
    known = _facts(max(older, key=_time)) if part.reusable and older else None
    table = _write(part, file, known)
    for stale in older:
        stale.unlink(missing_ok=True)
    return table


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # another process has just replaced it
        return 0


class Captioned:
    """What sources have in common whose captions may go through a grammar."""

    examples: Sequence[Example]
    grammar: Grammar | None

    def caption(self, index: int, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation; for training one that is drawn, and then what the
        grammar makes of it.
        """
        if draw is None:
            first = self.examples[index].captions[0]
            return self.grammar.plain(first) if self.grammar else first
        known = self.captions(index)
        texts = self.examples[index].captions if known is None else known
        text = texts[int(draw.integers(len(texts)))]
        return self.grammar.draw(text, draw) if self.grammar and known is None else text

    def captions(self, index: int) -> Sequence[str] | None:
        """Every text that ``caption`` can return, or None if the grammar varies them endlessly.

        ``grammar.variants`` texts are drawn once and for all if it is set.
        """
        example = self.examples[index]
        if not self.grammar:
            return example.captions
        if not self.grammar.varies:
            return [self.grammar.plain(text) for text in example.captions]
        if not self.grammar.variants:
            return None
        found = []
        for number in range(self.grammar.variants):
            text = example.captions[number % len(example.captions)]
            found.append(self.grammar.draw(text, stream(0, f"variant {example.key}", number)))
        return found


class Indexed(Captioned):
    """What sources have in common whose pictures lie in files; a base of their configs, which
    give ``parts`` and ``where``.
    """

    held_out_fraction: float

    def __getstate__(self) -> dict[str, Any]:
        """The config, and where the index is: another process maps the same files, and neither gets
        a copy of them nor looks for the pictures again.
        """
        kept = [f.name for f in dataclasses.fields(cast(Any, self))]
        if "examples" in vars(self):
            kept += ["examples", "parts"]
        return {name: getattr(self, name) for name in kept}

    @cached_property
    def parts(self) -> Sequence[Part]:
        """What is indexed as a whole, in order. Raises ``DataError`` if there is nothing."""
        raise NotImplementedError

    def where(self, key: str) -> str:
        """How an error names the picture ``key``, so that a user finds it."""
        raise NotImplementedError

    @cached_property
    def examples(self) -> Rows:
        """One example per picture that can be trained on."""
        tables = [index(part) for part in self.parts]
        rows = Rows(tables, self.held_out_fraction)
        # What they were listed from is a Python object per file: only the way to the bytes stays.
        vars(self)["parts"] = [replace(part, files=(), rows=tuple) for part in self.parts]
        return rows

    @property
    def problems(self) -> Sequence[Problem]:
        """Pictures and rows that cannot be trained on."""
        return self.examples.problems

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, int32 ``n 2``."""
        return self.examples.sizes

    @property
    def held_out(self) -> np.ndarray:
        """Which examples are held out, bool ``n``: by the hash of their bytes, so that a copy of a
        held-out picture is held out as well.
        """
        return self.examples.held_out

    @property
    def shards(self) -> np.ndarray | None:
        """None: each picture is a file, unless a layout says otherwise."""
        return None

    @property
    def passed_by(self) -> Counter[str]:
        """How many files of which suffix a layout takes for nothing of its own; of tars and tables
        none.
        """
        return Counter()

    def digest(self, index: int) -> str:
        """SHA-256 of the file's bytes, and of what is done with its colours if anything is."""
        return self.examples.digest(index)

    @property
    def digests(self) -> np.ndarray:
        """The same of every example, as bytes, uint8 ``n 32``."""
        return self.examples.digests

    def file(self, index: int) -> bytes:
        """The picture's file. Raises ``DataError`` if it cannot be read any more."""
        number, place = self.examples.place(index)
        key = self.examples.key(index)
        try:
            return self.parts[number].read(Row(key, (), place))
        except (OSError, DataError) as error:
            raise DataError(
                f"{self.where(key)}: the picture cannot be read ({_reason(error)})"
            ) from error

    def load(self, index: int) -> Image.Image:
        """The picture, upright and in sRGB; of an animation the first frame.

        Raises:
            DataError: it cannot be read any more.
        """
        return decode(self.file(index), self.where(self.examples.key(index)))


def _reason(error: OSError | DataError) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return text or " ".join(str(error).split()) or type(error).__name__


class _Known:
    """The facts of an older index by key and place: 16 bytes a row beside the mapped table."""

    def __init__(self, table: pa.Table) -> None:
        self._batches = table.select(_FACTS).to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)])
        hashes = np.empty(len(table), np.uint64)
        at = 0
        for batch in self._batches:
            columns = (batch.column(name).to_pylist() for name in ("key", *"abc"))
            for key, *place in zip(*columns, strict=True):
                hashes[at] = _hash(key, tuple(place))
                at += 1
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def facts(self, row: Row) -> Facts | None:
        """Those of a row that was without problem; None if there is none.

        A problem may be that of a row, which may have been cured elsewhere.
        """
        wanted = _hash(row.key, row.place)
        at = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            number = int(self._order[at])
            batch = int(np.searchsorted(self._starts, number, side="right")) - 1
            place = number - int(self._starts[batch])
            found = {name: self._batches[batch].column(name)[place].as_py() for name in _FACTS}
            if (found["key"], *(found[name] for name in "abc")) == (row.key, *row.place):
                if not found["problem"]:
                    return Facts(found["digest"], found["width"], found["height"], "")
            at += 1
        return None


def _hash(key: str, place: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(f"{key}\0{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _facts(file: Path) -> _Known | None:
    try:
        return _Known(Mapped.open(file).table)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        log.warning("%s cannot be read and is made anew: %s", file, error)
        return None


def _write(part: Part, file: Path, known: _Known | None) -> Mapped:
    """Makes the index of ``part``; it is kept as ``file`` unless something could not be read that
    may be readable another time.
    """
    passing: list[str] = []

    def examined(row: Row) -> tuple[Row, Facts]:
        found = known.facts(row) if known else None
        if found is not None or row.problem:
            return row, found or Facts(bytes(32), 0, 0, "")
        try:
            return row, look(part.read(row))
        except (OSError, DataError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOENT:
                passing.append(row.key)  # rights, a network: that changes no time of the file
            return row, Facts(bytes(32), 0, 0, unreadable(_reason(error)))

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}-{os.getpid()}.partial")
    # Decoders and hashes release Python's lock: threads are enough, and share the file caches.
    try:
        with (
            pa.ipc.new_file(str(partial), SCHEMA) as writer,
            ThreadPoolExecutor(os.cpu_count()) as pool,
            Progress(f"looking at the pictures of {part.path}", "pictures", None) as progress,
        ):
            for chunk in _chunks(part.rows(), _CHUNK):
                both = list(pool.map(examined, chunk))
                # Apart: the good rows of an index can then be used as they lie in the file.
                bad = [b for b in both if b[0].problem or b[1].problem]
                good = [b for b in both if not (b[0].problem or b[1].problem)] if bad else both
                for some in (good, bad):
                    if some:
                        writer.write_batch(_batch(some))
                progress.advance(len(both))
        if passing:
            log.warning("%d files of %s could not be read this time", len(passing), part.path)
            return Mapped(Mapped.open(partial).table, None)  # mapped when its name is gone
        partial.replace(file)
        return Mapped.open(file)
    finally:
        partial.unlink(missing_ok=True)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _batch(both: list[tuple[Row, Facts]]) -> pa.RecordBatch:
    columns = {
        "key": [row.key for row, _ in both],
        "captions": [row.captions for row, _ in both],
        **{
            name: [row.place[i] for row, _ in both]
            for i, name in enumerate("abc")
        },
        "digest": [facts.digest for _, facts in both],
        "width": [facts.width for _, facts in both],
        "height": [facts.height for _, facts in both],
        "problem": [row.problem or facts.problem for row, facts in both],
    }  # fmt: skip
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
