"""``webdataset``: pictures and captions in tars, as WebDataset lays them out.

Members are one sample if they share a key, the path up to the first dot of the file's name:
``0001.jpg`` + ``0001.txt`` (+ ``0001.json``). Every tar is gone through once, header by header, and
where the bytes of each picture begin is kept. So a picture is one seek and one read, wherever in a
tar a run goes on. Nothing is extracted, and nothing but captions and pictures is read: no pickle.

The convention: https://github.com/webdataset/webdataset#the-webdataset-format.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, NamedTuple

from ldm.data.captions import Grammar
from ldm.data.files import Files, below, find
from ldm.data.index import Part, state_of
from ldm.data.metadata import texts
from ldm.data.names import composed
from ldm.data.picture import READABLE, UNREADABLE, listed, not_read
from ldm.data.place import AtPath
from ldm.data.ranges import Share, Weight
from ldm.data.rows import Row, Rows
from ldm.errors import DataError
from ldm.storage.json import JsonError, parse_json

log = logging.getLogger(__name__)

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_TEXTS = ("txt", "text", "caption")
_COLUMNS = ("caption", "text")
_LISTED = 2  # how rows are told from members: raise it when the same tar becomes other rows
_LONGEST = 2**20  # bytes of a caption member; a longer one is no caption
_PACKED = (".gz", ".tgz", ".zst", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class _Place(NamedTuple):
    """Where the bytes of a member are in its tar."""

    offset: int
    length: int


@dataclass
class _Sample:
    """What the members of one key are, unread."""

    pictures: list[_Place] = field(default_factory=list)
    texts: list[_Place] = field(default_factory=list)
    tables: list[_Place] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    dotted: list[str] = field(default_factory=list)  # pictures with a dot before the suffix
    others: list[str] = field(default_factory=list)
    cut: bool = False


@dataclass(frozen=True)
class TarData(AtPath, Files):
    """Captioned pictures in local tars; the config *is* the source.

    The key of a picture is ``shard.tar/key``.

    Args:
        path: a tar, a folder of tars, or a pattern (``train-{000..099}.tar``).
        caption_column: where in ``key.json`` the captions are, a text or a list of texts; None: the
            text member (``.txt``, ``.text``, ``.caption``), and where there is none, ``caption`` or
            ``text`` of ``key.json``.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: what becomes of a caption at every use; None: nothing.
        weight: share of the draws against other sources'; None: its number of pictures.
    """

    path: str
    kind: Literal["webdataset"] = "webdataset"
    caption_column: str | None = None
    held_out_fraction: Share = 0.05
    grammar: Grammar | None = None
    weight: Weight | None = None

    suffix: ClassVar[str] = ".tar"
    endings: ClassVar[tuple[str, ...]] = TARS
    contents: ClassVar[str] = "tars"

    @cached_property
    def _found(self) -> tuple[Path, list[Path]]:
        folder = Path(self.path).expanduser()
        packed = [n for n in below(folder) if _packed(n)] if folder.is_dir() else []
        if packed or _packed(self.path):
            first = folder / min(packed) if packed else folder
            raise DataError(f"{first}: a compressed tar has no random access, decompress it")
        return find(self.path, self.suffix)

    def _part(self, file: Path, name: str) -> Part:
        return Part(
            path=str(file.resolve()),
            settings=f"webdataset {_LISTED} {name} {self.caption_column}",
            files=[state_of(file)],
            rows=partial(_rows, file, name, self.caption_column, self._ignored),
            read=partial(_read, file),
        )

    @cached_property
    def examples(self) -> Rows:
        """One example per picture that can be trained on."""
        found = super().examples
        if self._ignored:
            log.info(
                "%s: members beside the pictures that are not read: %s",
                self.name, listed(self._ignored),
            )  # fmt: skip
        return found

    @cached_property
    def _ignored(self) -> Counter[str]:
        """How many members of which suffix the indexing of this source has passed by."""
        return Counter()


def _read(file: Path, row: Row) -> bytes:
    offset, length, _ = row.place
    # Unbuffered: no byte is read that is not the picture's.
    with open(file, "rb", buffering=0) as raw:
        raw.seek(offset)
        data = raw.read(length)
    if len(data) != length:
        raise DataError("the tar ends before the picture does")
    return data


def _rows(file: Path, shard: str, column: str | None, ignored: Counter[str]) -> Iterator[Row]:
    """The rows of one tar, in the order in which the samples become whole, then what has no
    partner; ``ignored`` counts what is passed by.
    """
    with open(file, "rb") as raw:
        walk = _Walk(raw, shard, column, ignored)
        here, sample = "", _Sample()
        for member in _members(raw, file):
            if isinstance(member, str):
                yield Row(shard, (), problem=member)
                continue
            name = member.name.removeprefix("./")
            if wrong := _refused(member):
                printed = name.encode(errors="surrogateescape").decode(errors="replace")
                yield Row(f"{shard}/{printed}", (), problem=wrong)
                continue
            key, suffix = _split(name)
            if not key or member.isdir():
                continue
            if not key.isascii():  # a key is spelt as where it first stands
                key = walk.spelt.setdefault(composed(key), key)
            if key != here:
                yield from walk.close(here, sample)
                here, sample = key, walk.waiting.pop(key, None) or _Sample()
            _add(sample, member, name, suffix, walk.size)
        yield from walk.close(here, sample)
        for key, rest in walk.waiting.items():
            yield from walk.row(key, rest)


class _Walk:
    """What is known on the way through one tar.

    Args:
        raw: the tar.
        shard: its name in keys.
        column: of ``key.json``, as in ``TarData``.
        ignored: counts members by suffix that are passed by.
    """

    def __init__(
        self, raw: BinaryIO, shard: str, column: str | None, ignored: Counter[str]
    ) -> None:
        self.raw, self.shard, self.column, self.ignored = raw, shard, column, ignored
        self.size = os.fstat(raw.fileno()).st_size
        # Members of a key lie apart in a tar that was packed unsorted.
        self.waiting: dict[str, _Sample] = {}
        self.done: set[str] = set()
        self.spelt: dict[str, str] = {}

    def close(self, key: str, sample: _Sample) -> Iterator[Row]:
        """The row of a sample behind which another key begins, unless something is still to
        come.
        """
        if key in self.done:
            if sample.pictures or sample.texts or sample.tables:
                yield self._bad(key, "keys that stand twice in a tar; rename them")
        elif sample.pictures and self._captioned(sample):
            self.done.add(key)
            yield from self.row(key, sample)
        elif key:
            self.waiting[key] = sample

    def row(self, key: str, sample: _Sample) -> Iterator[Row]:
        """What becomes of a sample of which nothing more can come."""
        if sample.cut:
            yield self._bad(key, "samples that the end of the tar cuts off; copy the tar again")
        elif len(sample.pictures) > 1:
            yield self._bad(key, "samples with several pictures; give each its own key")
        elif sample.pictures:
            passed = sample.others + sample.dotted + sample.unreadable
            self.ignored.update(os.path.splitext(name)[1].lower() for name in passed)
            captions, wrong = self._captions(sample)
            yield Row(f"{self.shard}/{key}", captions, (*sample.pictures[0], 0), wrong)
        elif sample.dotted:
            wrong = "pictures with a dot in their name, where a key ends; rename them"
            yield from (self._bad(name, wrong) for name in sample.dotted)
        elif sample.unreadable:
            yield self._bad(key, not_read(sample.unreadable[0]))
        else:
            yield self._bad(key, "samples without a picture; add it or remove them")

    def _bad(self, key: str, problem: str) -> Row:
        return Row(f"{self.shard}/{key}", (), problem=problem)

    def _captioned(self, sample: _Sample) -> list[_Place]:
        return sample.tables if self.column else sample.texts or sample.tables

    def _captions(self, sample: _Sample) -> tuple[tuple[str, ...], str]:
        """The captions of a sample, and what is wrong with it or ""."""
        found = self._captioned(sample)
        if not found:
            return (), "pictures without a caption; caption or remove them"
        if len(found) > 1:
            return (), "pictures with several caption members; keep one"
        if found[0].length > _LONGEST:
            return (), f"captions of more than {_LONGEST} bytes; shorten them"
        self.raw.seek(found[0].offset)
        data = self.raw.read(found[0].length)
        try:
            value: object = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return (), "captions that are not UTF-8; save them as UTF-8"
        if found is sample.tables:
            try:
                table = parse_json(data)
            except JsonError:
                return (), "captions in a .json that is not valid JSON; repair it"
            columns = [self.column] if self.column else _COLUMNS
            cells = [table[c] for c in columns if c in table] if isinstance(table, dict) else []
            if not cells:
                named = " or ".join(map(repr, columns))
                return (), f"pictures whose .json has no {named}; write it"
            value = cells[0]
        captions = texts(value)
        if captions is None:
            return (), "pictures whose caption is empty or no text; caption or remove them"
        return captions, ""


def _packed(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    return suffix == ".tgz" or (suffix in _PACKED and stem.endswith(".tar"))


def _members(raw: BinaryIO, file: Path) -> Iterator[tarfile.TarInfo | str]:
    """Every member of a tar, and at the end what is wrong with the tar, if anything is.

    Raises:
        DataError: it is compressed.
    """
    start = raw.read(6)
    packed = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if packed:
        raise DataError(f"{file}: this tar is compressed ({packed}), decompress it")
    raw.seek(0)
    damaged = "tars that are cut off or damaged; copy them again"
    reached = -1
    try:
        with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep every one
                # A negative size leads back: without this the walk would not end.
                if tar.offset <= reached or member.size < 0:
                    yield damaged
                    return
                reached = tar.offset
                yield member
            # tarfile takes a header that it does not understand for the end.
            raw.seek(tar.offset)
            end = raw.read(tarfile.BLOCKSIZE)
    except Exception:  # a broken tar makes tarfile raise anything
        log.debug("%s", file, exc_info=True)
        yield damaged
        return
    if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
        yield damaged
        return
    while rest := raw.read(2**20):
        if rest.strip(b"\0"):
            yield "tars with more members behind their end; do not join tars with cat"
            return


def _refused(member: tarfile.TarInfo) -> str:
    """Why the member is not looked at, or ""."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "members with an absolute name or a .. in it; pack them under plain names"
    if not _encodable(member.name):
        return "members whose name is not UTF-8; rename them"
    if member.isdir() or (member.isreg() and not member.issparse()):
        return ""
    return "members that are links, devices or sparse files; pack plain files"


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(name: str) -> tuple[str, str]:
    """Key and suffix, in small letters and without its dot; no key for what is hidden, or has no
    suffix.
    """
    folder, slash, base = name.rpartition("/")
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    stem, dot, suffix = base.partition(".")
    return ("", "") if hidden or not dot else (f"{folder}{slash}{stem}", suffix.lower())


def _add(sample: _Sample, member: tarfile.TarInfo, name: str, suffix: str, end: int) -> None:
    place = _Place(member.offset_data, member.size)
    sample.cut |= sum(place) > end
    last = f".{suffix.rpartition('.')[2]}"
    if f".{suffix}" in READABLE:
        sample.pictures.append(place)
    elif suffix in _TEXTS:
        sample.texts.append(place)
    elif suffix == "json":
        sample.tables.append(place)
    elif last in READABLE:
        sample.dotted.append(name)
    elif last in UNREADABLE:
        sample.unreadable.append(name)
    else:
        sample.others.append(name)
