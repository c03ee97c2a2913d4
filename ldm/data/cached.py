"""``cached``: a set of pictures and captions that went through the frozen networks ahead of time.

    cached.json            what it is made with; written first
    vae/ text_encoder/ tokenizer/
    latents/WxH/*.safetensors   text/*.safetensors      moments and embeddings, by content
    source-000.arrow       a row per picture: key, captions, digest, size, shape, held out or not
    manifest.json          the sources, and the SHA-256 of every file; written last

It is all that a run needs: neither the pictures nor the networks that it was made from. A set
without a manifest is not complete (``ldm.tasks.precompute`` makes and completes it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict

from ldm.data.captions import Grammar
from ldm.data.place import AtPath, Place
from ldm.data.rows import SCHEMA, Mapped, Rows
from ldm.data.source import Problem, Source, SourceGroup
from ldm.errors import DataError
from ldm.storage.disk import atomic_write
from ldm.storage.json import JsonError, read_json

MADE_WITH, MANIFEST = "cached.json", "manifest.json"
FORMAT = 1  # raise it when the meaning of a file changes
_CHUNK = 8192  # rows

# "captions" are all that training can draw; the keys of their embeddings are hashes of them.
INDEX = pa.schema(
    [
        *(SCHEMA.field(name) for name in ("key", "captions", "digest", "width", "height")),
        SCHEMA.field("problem"),  # always ""
        ("evaluation", pa.string()),  # the caption that evaluation sees
        ("shape", pa.list_(pa.int32(), 2)),  # width and height at which networks see it
        ("held_out", pa.bool_()),
        ("shard", pa.int32()),  # of its source, null where each picture lies for itself
    ]
)


class _IndexRows(Rows):
    """Rows that say themselves whether they are held out."""

    @cached_property
    def held_out(self) -> np.ndarray:
        """Whether each is never trained on, bool ``n``."""
        parts = [b.column("held_out").to_numpy(zero_copy_only=False) for b in self.tables()]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def evaluation(self, index: int) -> str:
        """The caption that evaluation sees."""
        return self._cell("evaluation", index)


@dataclass(frozen=True)
class CachedSource:
    """One of the sources that a set was made from.

    Args:
        file: its index.
        name: what an error about the whole of it begins with.
        weight: that of the source it was made from.
    """

    file: Path
    name: str
    weight: float | None

    @property
    def grammar(self) -> Grammar | None:
        """None: the texts are what grammar made of the captions."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """The config alone: another process maps the same index."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a frozen dataclass."""
        vars(self).update(state)

    @cached_property
    def examples(self) -> _IndexRows:
        """One example per picture."""
        try:
            table = Mapped.open(self.file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.file} cannot be read: {error}") from None
        return _IndexRows([table], 0)

    @property
    def problems(self) -> Sequence[Problem]:
        """None: what could not be used is not in the set."""
        return ()

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, int32 ``n 2``."""
        return self.examples.sizes

    @property
    def held_out(self) -> np.ndarray:
        """Which examples are held out, bool ``n``."""
        return self.examples.held_out

    @cached_property
    def shards(self) -> np.ndarray | None:
        """Number of what each picture was read from together with its neighbours, ascending, ``n``;
        None where each lay for itself.
        """
        batches = list(self.examples.tables())
        if not batches or batches[0].column("shard").null_count:
            return None
        return self.examples.column("shard")

    def load(self, index: int) -> NoReturn:
        """Raises ``DataError``: a set holds no pictures."""
        raise DataError(f"{self.file.parent}: a cached set holds no pictures, only their latents")

    def digest(self, index: int) -> str:
        """Hex SHA-256 of what the picture was made from."""
        return self.examples.digest(index)

    @property
    def digests(self) -> np.ndarray:
        """The same of every example, as bytes, uint8 ``n 32``."""
        return self.examples.digests

    def caption(self, index: int, draw: np.random.Generator | None) -> str:
        """The first caption for evaluation, a drawn one for training."""
        if draw is None:
            return self.examples.evaluation(index)
        texts = self.captions(index)
        return texts[int(draw.integers(len(texts)))]

    def captions(self, index: int) -> Sequence[str]:
        """Every text that ``caption`` can draw."""
        return self.examples[index].captions


@dataclass(frozen=True)
class CachedData(AtPath, SourceGroup):
    """What ``ldm data cache`` wrote; the config *is* the group of its sources.

    Weights, captions and what is held out are those of the config that it was made with.

    Args:
        path: its folder.
    """

    path: str
    kind: Literal["cached"] = "cached"

    precedence: ClassVar[int] = 3

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """A folder that says what it was made with."""
        made = place.folder is not None and (place.folder / MADE_WITH).is_file()
        return f"there is {MADE_WITH}" if made else None

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return str(self.folder)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.path).expanduser()

    @cached_property
    def made_with(self) -> MadeWith:
        """Fingerprints and settings of all that its numbers depend on. Raises ``DataError``."""
        file, absent = self.folder / MADE_WITH, "is no cached set, make one with `ldm data cache`"
        broken = "what the set was made with is not known any more, make another"
        if _json(file, _Format, absent, broken)["format"] != FORMAT:
            raise DataError(f"{self.name}: made by another version of ldm, make it again")
        return _json(file, MadeWith, absent, broken)

    @cached_property
    def manifest(self) -> Manifest:
        """Its sources, and the hash of every file. Raises ``DataError`` if it is not complete."""
        _ = self.made_with  # whether it is a set
        found = _json(
            self.folder / MANIFEST,
            Manifest,
            "is not complete: the `ldm data cache` that began it goes on when it is started again",
            "the `ldm data cache` that made it makes it again",
        )
        for name in found["sha256"]:
            if not (self.folder / name).is_file():
                raise DataError(
                    f"{self.name}: {name} is missing; the `ldm data cache` that made it makes it"
                    " again"
                )
        return found

    @cached_property
    def sources(self) -> Sequence[Source]:
        """The sources, in order. Raises ``DataError`` where an index is not what was written."""
        found = []
        for entry in self.manifest["sources"]:
            file = self.folder / entry["index"]
            try:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from None
            if digest != self.manifest["sha256"].get(entry["index"]):
                raise DataError(
                    f"{file} is not what was written (its SHA-256 differs): remove it and start"
                    " `ldm data cache` again"
                )
            found.append(CachedSource(file, entry["name"], entry["weight"]))
        return found


class _Format(TypedDict):
    format: int


class MadeWith(_Format):
    """What is in ``MADE_WITH``."""

    images: dict[str, Any]
    described: dict[str, Any]
    fingerprints: dict[str, str]
    origin: dict[str, Any]
    pillow: str
    cache_dtype: NotRequired[str]
    cache_precision: NotRequired[str]
    frozen: NotRequired[str]


class _Entry(TypedDict):
    name: str
    weight: float | None
    index: str


class _Pictures(TypedDict):
    train: int
    held_out: int


class Manifest(TypedDict):
    """What is in ``MANIFEST``, as far as it is read."""

    sources: list[_Entry]
    pictures: _Pictures
    content: list[str]
    sha256: dict[str, str]


def _json(file: Path, kind: Any, absent: str, broken: str) -> Any:
    """What ``file`` holds, or a ``DataError`` that says what to do."""
    try:
        return read_json(file, kind)
    except FileNotFoundError:
        raise DataError(f"{file.parent} {absent}") from None
    except JsonError as error:
        raise DataError(f"{error}; {broken}") from None


def write_index(
    file: Path, source: Source, chosen: np.ndarray, shapes: np.ndarray, held_out: np.ndarray
) -> None:
    """The index of ``source``.

    Args:
        file: what is written.
        source: whose captions do not vary endlessly.
        chosen: numbers of its examples, ``n``, rising.
        shapes: width and height at which networks see them, ``n 2``.
        held_out: bool ``n``.
    """
    shards = source.shards
    with atomic_write(file) as partial, pa.ipc.new_file(str(partial), INDEX) as writer:
        for first in range(0, len(chosen), _CHUNK):
            some = slice(first, first + _CHUNK)
            numbers = chosen[some].tolist()
            sizes = source.sizes[chosen[some]]
            columns = {
                "key": [source.examples[n].key for n in numbers],
                "captions": [source.captions(n) for n in numbers],
                "digest": [bytes.fromhex(source.digest(n)) for n in numbers],
                "width": sizes[:, 0],
                "height": sizes[:, 1],
                "problem": [""] * len(numbers),
                "evaluation": [source.caption(n, None) for n in numbers],
                "shape": list(shapes[some]),
                "held_out": held_out[some],
                "shard": [None] * len(numbers) if shards is None else shards[chosen[some]],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=INDEX))


def texts(sources: Sequence[Source]) -> Iterator[str]:
    """Every text that a run over ``sources`` can ask for, with repeats."""
    yield ""
    for source in sources:
        rows = source.examples
        assert isinstance(rows, Rows)
        for table in rows.tables():
            held_out = table.column("held_out")
            drawn = table.column("captions").filter(pc.invert(held_out))
            yield from drawn.flatten().to_pylist()
            yield from table.column("evaluation").filter(held_out).to_pylist()
