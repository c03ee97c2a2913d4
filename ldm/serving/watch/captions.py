"""Captions of a folder changed where they stand: one line of a text file, or of
``metadata.jsonl``.

What stood there before is a line of ``.captions/log.jsonl`` in the folder (hidden, no part of the
data) that is on the disk before the file is changed, so that every change can be taken back, also
by the next server. Files are written whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from typing_extensions import TypedDict

from ldm.data.folder import FolderData, sidecars, walk
from ldm.data.metadata import TABLES, is_text, rows_of, spoken
from ldm.data.names import Names, Root
from ldm.errors import DataError
from ldm.serving.watch.errors import Conflict
from ldm.storage.disk import atomic_write, write_text
from ldm.storage.json import JsonError, parse_json

LOG = ".captions/log.jsonl"


class _Entry(TypedDict):
    """A line of the log: line ``line`` (from 0) of ``file`` was ``before`` and became ``after``."""

    edit: int
    key: str
    file: str
    line: int
    before: str
    after: str


class _Place(NamedTuple):
    """Where the caption of a picture stands: a line of a file; of a table its column."""

    file: str
    line: int
    column: str | None


class Captions:
    """Changes captions of ``source``; one caller at a time.

    Args:
        source: the folder as it is now.
    """

    def __init__(self, source: FolderData) -> None:
        self._source, self._root = source, source.root

    def edit(self, changes: Mapping[str, Sequence[str]]) -> int:
        """Gives pictures other captions; how many lines are changed.

        Args:
            changes: captions by key; a text file has one.

        Raises:
            ValueError: a caption is empty, or stands where it is not changed; then nothing is.
        """
        files, _ = walk(self._root, self._source.links)
        places = self._places([*files], changes)
        entries: list[_Entry] = []
        number = max((entry["edit"] for entry in self.log()), default=0) + 1
        texts: dict[str, list[str]] = {}
        for key, captions in changes.items():
            place = places[key]
            lines = texts.setdefault(place.file, self._lines(place.file))
            before = lines[place.line]
            after = _changed(key, before, captions, place)
            if after != before:
                lines[place.line] = after
                entries.append(
                    {
                        "edit": number, "key": key, "file": place.file, "line": place.line,
                        "before": before, "after": after,
                    }
                )  # fmt: skip
        self._note(entries)
        for file in dict.fromkeys(entry["file"] for entry in entries):
            self._write(file, texts[file])
        return len(entries)

    def undo(self) -> list[str]:
        """Takes the last edit back; keys of its pictures.

        Raises:
            Conflict: there is none, or a line is not what it became.
        """
        log = self.log()
        if not log:
            raise Conflict("no caption was changed here")
        last = [entry for entry in log if entry["edit"] == log[-1]["edit"]]
        texts: dict[str, list[str]] = {}
        for entry in reversed(last):
            lines = texts.setdefault(entry["file"], self._lines(entry["file"]))
            there = lines[entry["line"]] if entry["line"] < len(lines) else None
            if there not in (entry["after"], entry["before"]):  # the latter: it was never written
                raise Conflict(f"{entry['file']} has been changed since, and is left as it is")
            lines[entry["line"]] = entry["before"]
        for file, lines in texts.items():
            self._write(file, lines)
        rest = [entry for entry in log if entry["edit"] != log[-1]["edit"]]
        write_text(self._root / LOG, "".join(json.dumps(entry) + "\n" for entry in rest))
        return [entry["key"] for entry in last]

    def log(self) -> list[_Entry]:
        """All edits that can be taken back, the oldest first."""
        try:
            lines = (self._root / LOG).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        found: list[_Entry] = []
        for line in filter(None, lines):
            try:
                entry = parse_json(line, _Entry)
            except JsonError:
                continue  # it was being written: its edit was not begun
            if self._inside(entry["file"]):
                found.append(entry)
        return found

    def _places(self, names: Sequence[str], changes: Mapping[str, object]) -> dict[str, _Place]:
        found: dict[str, _Place] = {}
        wanted, texts = set(changes), Names(set(names))
        tabled = self._tabled(names, wanted)
        for key in changes:
            mine = [name for place in sidecars(key) for name in texts.find(place)]
            rows = tabled.get(key, [])
            if len(mine) + len(rows) != 1:
                several = "in several places" if mine or rows else "in no file that is changed here"
                raise ValueError(f"{key}: its captions stand {several}")
            if rows:
                table, line = rows[0]
                if not table.endswith(".jsonl"):
                    raise ValueError(f"{key}: of tables only metadata.jsonl is changed here")
                found[key] = _Place(table, line, self._source.caption_column)
            else:
                if self._source.lines != "first":
                    raise ValueError(f"{key}: its file has several captions")
                found[key] = _Place(mine[0], self._first(mine[0]), None)
        return found

    def _tabled(self, names: Sequence[str], wanted: set[str]) -> dict[str, list[tuple[str, int]]]:
        """Table and line of every row of ``wanted`` pictures."""
        found: dict[str, list[tuple[str, int]]] = {}
        root = Root(self._root, Names({*names}))
        columns = self._source.image_column, self._source.caption_column
        for table in names:
            if PurePosixPath(table).name not in TABLES:
                continue
            try:
                for where, key, _, _ in rows_of(root, self._root / table, table, *columns):
                    if key in wanted:
                        line = int(where.removeprefix(f"{table}:").split(" ")[0]) - 1
                        found.setdefault(key, []).append((table, line))
            except DataError:
                continue  # the check tells of it
        return found

    def _first(self, file: str) -> int:
        """The first line that says something, which is the caption."""
        lines = self._lines(file)
        return next((n for n, line in enumerate(lines) if spoken(line)), 0)

    def _lines(self, file: str) -> list[str]:
        """Lines with their ends, as reading has them: a lone carriage return ends one as well."""
        if not self._inside(file):
            raise ValueError(f"{file}: lies outside of the folder")
        try:
            text = (self._root / file).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"{file}: cannot be read as UTF-8") from None
        return [*io.StringIO(text, newline="")] or [""]

    def _write(self, file: str, lines: list[str]) -> None:
        text = "".join(lines)
        place = Path(os.path.realpath(self._root / file))
        with atomic_write(place) as partial:
            partial.write_bytes(text.encode())  # no line end is translated

    def _note(self, entries: Sequence[_Entry]) -> None:
        file = self._root / LOG
        if not entries:
            return
        if not self._inside(LOG):
            raise ValueError(".captions is a link out of the folder: remove it")
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            # A line that a kill has cut short must not take the next one with it.
            log.write("".join(f"\n{json.dumps(entry)}" for entry in entries) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def _inside(self, file: str) -> bool:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            return False
        real = os.path.realpath(self._root)
        place = os.path.realpath(self._root / file)
        return self._source.links or os.path.commonpath([real, place]) == real


def _changed(key: str, before: str, captions: Sequence[str], place: _Place) -> str:
    """The line with other captions, its end and all else as they are."""
    told = [spoken(text) for text in captions if is_text(text)]
    if not told or not all(told) or len(told) < len(captions):
        raise ValueError(f"{key}: a caption is empty or no text")
    body = before.rstrip("\r\n")
    end, mark = before[len(body) :], "\ufeff" * body.startswith("\ufeff")
    if place.column is None:
        if len(told) > 1:
            raise ValueError(f"{key}: a text file has one caption")
        return mark + told[0] + end
    row = parse_json(body.removeprefix("\ufeff"), dict)
    alone = len(told) == 1 and not isinstance(row[place.column], list)
    if [*told] == (row[place.column] if not alone else [row[place.column]]):
        return before
    row[place.column] = told[0] if alone else told
    return mark + json.dumps(row, ensure_ascii=body.isascii()) + end
