"""``folder``: the pictures below a folder, with the captions that lie beside them.

Captions come from ``metadata.jsonl``, ``.csv`` or ``.parquet`` (a row per picture; ``file_name`` is
relative to the file's own folder, a list is several captions) or from a text file beside each
picture: ``cat.txt``, ``cat.caption`` or ``cat.jpg.txt``. Names are compared in Unicode normal form
C. Nothing is lost silently: whatever has no partner is a problem with a name. Hidden files and
folders are not looked at.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

from ldm.data.captions import Grammar
from ldm.data.hints import NOT_BOTH, Hints
from ldm.data.index import Indexed, Part
from ldm.data.metadata import TABLES, Lines, is_text, lines_of, read_text, rows_of
from ldm.data.names import Names, Root, composed, of_windows
from ldm.data.picture import READABLE, UNREADABLE, not_read, passed_by
from ldm.data.place import AtPath, Place, counted
from ldm.data.ranges import Share, Weight
from ldm.data.rows import Row
from ldm.errors import DataError

log = logging.getLogger(__name__)

_SIDECARS = (".txt", ".caption")
_LISTED = 2  # how rows are told from files: raise it when the same files become other rows
# Texts that travel with data sets and describe no single picture.
DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "changelog", "credits")
LAYOUTS = (
    "metadata.jsonl with file_name and text, or a text file beside each picture "
    "(cat.txt, cat.caption or cat.jpg.txt)"
)


@dataclass(frozen=True)
class FolderData(AtPath, Indexed):
    """Captioned pictures below a folder; the config *is* the source.

    Several rows for one picture are several captions.

    Args:
        path: the folder; all folders below it are read too.
        caption_column: where the captions are in ``metadata.*``: a text, or a list of texts.
        image_column: where the file names are.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: what becomes of a caption at every use; None: nothing.
        weight: share of the draws against other sources'; None: its number of pictures.
        links: follow links that lead out of the folder; off, they are problems.
        hints: a folder that does not lie in this one, with a picture of the same name for each,
            whatever its suffix: what a ControlNet learns to follow; None: there are none.
        hint_column: where ``metadata.*`` names such pictures, of this folder, in place of
            ``hints`` (``conditioning_image``); None: nowhere.
        lines: which lines of a text file are captions: the ``first`` alone, as in sd-scripts;
            ``each``, of which training draws one; or all of them ``joined`` to one caption.
    """

    path: str
    kind: Literal["folder"] = "folder"
    caption_column: str = "text"
    image_column: str = "file_name"
    held_out_fraction: Share = 0.05
    grammar: Grammar | None = None
    weight: Weight | None = None
    links: bool = False
    hints: str | None = None
    lines: Lines = "first"
    hint_column: str | None = None

    contents: ClassVar[str] = "pictures"

    def __post_init__(self) -> None:
        if self.hints is not None and self.hint_column is not None:
            raise ValueError(NOT_BOTH)

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """A folder with pictures, or with a table of captions."""
        return counted(cls.contents, place.pictures) or counted("tables of captions", place.tables)

    @property
    def root(self) -> Path:
        """The folder, ``~`` resolved."""
        return Path(self.path).expanduser()

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return str(self.root)

    def where(self, key: str) -> str:
        """The path of a picture."""
        return str(self.root / key)

    @cached_property
    def parts(self) -> Sequence[Part]:
        """The folder as a whole."""
        files, strays = walk(self.root, self.links)
        hinted = f" {self.hint_column!r}" if self.hint_column else ""
        vars(self)["passed_by"] = passed_by(files, DOCUMENTS)  # here, where they are listed anyway
        return [
            Part(
                path=str(self.root.resolve()),
                settings=f"folder {_LISTED} {self._columns} {self.links} {self.lines}{hinted}",
                files=[(name, *state) for name, state in files.items()],
                rows=partial(self._rows, files, strays),
                read=partial(_read, self.root),
                reusable=True,
            )
        ]

    @cached_property
    def beside(self) -> Hints | None:
        """The hints, if there are some. Raises ``DataError`` if their folder cannot be read."""
        if self.hint_column is not None:
            files, _ = walk(self.root, self.links)
            return Hints.below(self.root, files, self._hinted(files))
        if self.hints is None:
            return None
        root = Path(self.hints).expanduser()
        if not root.is_dir():
            raise DataError(f"{root}: there is no such folder, check data.hints")
        return Hints.below(root, walk(root, self.links)[0])

    def _hinted(self, files: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """The picture that the tables name as the hint of each, by keys. Raises ``DataError`` if
        they name none.
        """
        found = dict[str, str]()
        if self.hint_column is None:
            return found
        pictures = {key for key in files if key.lower().endswith((*READABLE, *UNREADABLE))}
        root, (picture, caption) = Root(self.root, Names(pictures)), self._columns
        for table in sorted((key for key in files if Path(key).name in TABLES), key=natural):
            # What is wrong with a table is told where its captions are read.
            with suppress(DataError):
                both = (
                    rows_of(root, self.root / table, table, column, caption)
                    for column in (picture, self.hint_column)
                )
                for (_, key, *_), (_, hint, *_) in zip(*both, strict=True):
                    if key and hint:
                        found[key] = hint
        if not found:
            raise DataError(
                f"{self.root}: no {TABLES[0]} here names a picture of this folder in a column"
                f" {self.hint_column!r}, check data.hint_column"
            )
        return found

    @property
    def _columns(self) -> tuple[str, str]:
        return self.image_column, self.caption_column

    @cached_property
    def passed_by(self) -> Counter[str]:
        """How many files of which suffix are neither pictures nor captions."""
        return passed_by(walk(self.root, self.links)[0], DOCUMENTS)

    def _rows(self, files: dict[str, tuple[int, int]], strays: list[Row]) -> Iterator[Row]:
        """One row per picture in natural order (``2.png`` before ``10.png``), then the problems."""
        pictures = {key for key in files if key.lower().endswith(READABLE)}
        hinted = self._hinted(files)
        pictures -= hinted.values() - hinted.keys()
        unread = {key: None for key in files if key.lower().endswith(UNREADABLE)}
        if not pictures and not strays and not unread:
            raise DataError(
                f"{self.root}: no picture in this folder or below it, "
                f"put {', '.join(READABLE[:5])} ... there with captions as {LAYOUTS}"
            )
        doubles = Names(pictures).doubles()
        captions, problems, tabled = self._tables(files, pictures, unread.keys())
        single = pictures - {row.key for row in doubles}
        problems += self._sidecars(files, pictures, single, captions, tabled)
        # What is wrong with a picture comes first, and its caption is not to blame.
        beside = {composed(text) for key in unread for text in sidecars(key)}
        problems = [
            *(Row(key, (), problem=not_read(key)) for key in unread),
            *(row for row in (*strays, *doubles, *problems) if composed(row.key) not in beside),
        ]
        if not captions and not problems:
            raise DataError(
                f"{self.root}: {len(pictures)} pictures but no captions, write them as {LAYOUTS}"
            )
        for key in sorted(single, key=natural):
            if key in captions:
                yield Row(key, captions[key], place=(*files[key], 0))
        yield from problems
        named = {row.key for row in problems}
        for key in sorted(pictures - captions.keys() - named, key=natural):
            yield Row(key, (), problem="pictures without a caption; caption or remove them")

    def _tables(
        self, files: dict[str, tuple[int, int]], pictures: Set[str], unread: Set[str]
    ) -> tuple[dict[str, tuple[str, ...]], list[Row], tuple[str, ...]]:
        """Captions by key, problems, and the folders that have a table. Rows of what is ``unread``
        are not to blame.
        """
        found: dict[str, tuple[str, ...]] = {}
        problems: list[Row] = []
        root = Root(self.root, Names(pictures | unread))
        tables = [key for key in files if Path(key).name in TABLES]
        for table in sorted(tables, key=natural):
            file, mine = self.root / table, dict[str, tuple[str, ...]]()
            try:
                for where, key, captions, problem in rows_of(root, file, table, *self._columns):
                    if key in unread:
                        continue
                    if problem:
                        problems.append(Row(where, (), problem=problem))
                    else:
                        mine[key] = mine.get(key, ()) + captions
            except DataError as error:
                reason = str(error).removeprefix(f"{file}: ")
                wrong = f"tables that cannot be read ({reason}); repair or remove them"
                problems.append(Row(table, (), problem=wrong))
            if again := _join(found, mine):
                log.warning(
                    "%s: captions of %d pictures stand in another table as well, and are read once",
                    file, again,
                )  # fmt: skip
        return found, problems, tuple(key[: -len(Path(key).name)] for key in tables)

    def _sidecars(
        self,
        files: dict[str, tuple[int, int]],
        pictures: set[str],
        single: set[str],
        captions: dict[str, tuple[str, ...]],
        tabled: tuple[str, ...],
    ) -> Iterator[Row]:
        """Adds what text files say of ``single`` pictures to ``captions``, and yields what is wrong
        with the files.
        """
        texts = {key for key in files if key.lower().endswith(_SIDECARS)}
        names, used, cut = Names(texts), set[str](), 0
        for key in sorted(pictures, key=natural):
            mine = [name for place in sidecars(key) for name in names.find(place)]
            used.update(mine)
            if not mine or key not in single:
                continue
            wrong, found = "", ()
            if len(mine) > 1:
                wrong = f"pictures with several caption files ({' and '.join(mine)}); keep one"
            elif key in captions:
                wrong = "pictures with a metadata row and also a text file; keep one of the two"
            else:
                try:
                    text = read_text(self.root / mine[0])
                except DataError as error:
                    reason = str(error).removeprefix(f"{self.root / mine[0]}: ")
                    wrong = f"pictures whose caption file is unreadable ({reason}); repair it"
                else:
                    first = self.lines == "first"
                    every = lines_of(text, "each" if first else self.lines)
                    found, cut = every[:1] if first else every, cut + (first and len(every) > 1)
                    wrong = "" if found else "pictures with an empty caption file; write it"
            if wrong:
                captions.pop(key, None)
                yield Row(key, (), problem=wrong)
            else:
                captions[key] = found
        for key in sorted(texts - used, key=natural):
            # Where captions are in a table, texts beside it are about something else.
            document = Path(key).stem.lower().startswith(DOCUMENTS)
            if not document and not key.startswith(tabled):
                wrong = "caption files without a picture; add it or remove them"
                yield Row(key, (), problem=wrong)
        if cut:
            log.warning(
                "%s: of %d caption files with several lines the first is used; data.lines=each"
                " draws one of them, joined makes one caption of all", self.root, cut,
            )  # fmt: skip


def _join(found: dict[str, tuple[str, ...]], table: dict[str, tuple[str, ...]]) -> int:
    """Adds the captions of a further table to those that are ``found``, but none that is there;
    how many pictures of it say nothing new.
    """
    again = 0
    for key, captions in table.items():
        there = found.get(key, ())
        new = tuple(text for text in captions if text not in there) if there else captions
        found[key] = there + new
        again += not new
    return again


def _read(root: Path, row: Row) -> bytes:
    return (root / row.key).read_bytes()


def sidecars(key: str) -> list[str]:
    """Where the caption of a picture may lie: ``cat.txt``, ``cat.caption``, ``cat.jpg.txt``, ..."""
    stem = key[: -len(Path(key).suffix)]
    return [base + suffix for base in (stem, key) for suffix in _SIDECARS]


def walk(root: Path, links: bool) -> tuple[dict[str, tuple[int, int]], list[Row]]:
    """Every file below ``root`` that is not hidden, by its path with ``/`` between the parts: bytes
    and time of change in ns; and the links that lead out of it, as problems.

    Raises:
        DataError: ``root`` is no folder, or one below it cannot be read.
    """
    if not root.exists():
        where = " (a path of Windows: write where it is on this machine)" * of_windows(str(root))
        raise DataError(f"{root}: this folder does not exist, check data.path{where}")
    if not root.is_dir():
        raise DataError(f"{root}: this is a file, set data.path to a folder of pictures")
    real = os.path.realpath(root)
    found: dict[str, tuple[int, int]] = {}
    strays: list[Row] = []
    seen: set[str] = set()

    def descend(folder: str, below: str) -> None:
        here = os.path.realpath(folder)
        if here in seen:  # a link back up
            return
        seen.add(here)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be read ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            key = f"{below}{entry.name}"
            if not is_text(entry.name):  # file systems take any bytes
                shown = os.fsencode(key).decode(errors="backslashreplace")
                wrong = "files whose name is not UTF-8; rename them"
                strays.append(Row(shown, (), problem=wrong))
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not os.path.exists(target):
                    strays.append(Row(key, (), problem="links to nothing; remove them"))
                    continue
                if not links and os.path.commonpath([real, target]) != real:
                    wrong = "links that lead out of the folder; copy the files, or set data.links"
                    strays.append(Row(key, (), problem=wrong))
                    continue
            if entry.is_dir():
                descend(entry.path, f"{key}/")
            elif not entry.is_file():  # a pipe: opening it would wait for ever
                strays.append(Row(key, (), problem="neither files nor folders; remove them"))
            else:
                state = entry.stat()
                found[key] = (state.st_size, state.st_mtime_ns)

    descend(str(root), "")
    return found, strays


def natural(key: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts numbers by value; the key itself breaks ties (``1.png``, ``01.png``)."""
    parts = (part for part in re.split(r"([0-9]+)", key.lower()) if part)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], key
