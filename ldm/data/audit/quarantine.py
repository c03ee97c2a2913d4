"""Puts the offenders of a folder aside, and back: nothing is ever deleted or written over.

A file ``sub/cat.png`` goes to ``.quarantine/1/sub/cat.png`` (hidden folders are no part of the
data), its captions with it; rows of ``metadata.*`` are taken out by putting the table aside and
writing one without them. Every step is a line of ``.quarantine/log.jsonl`` that is on the disk
*before* the step is taken, so that an interruption at any point can be undone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TextIO

from ldm.data.audit.tables import without
from ldm.data.folder import FolderData, sidecars, walk
from ldm.data.metadata import TABLES, rows_of
from ldm.data.names import Names, Root, composed
from ldm.data.picture import READABLE, UNREADABLE
from ldm.errors import DataError
from ldm.storage.disk import write_text
from ldm.storage.json import parse_json

FOLDER = ".quarantine"
_LOG = "log.jsonl"


@dataclass
class Outcome:
    """What was done, and what was not.

    Args:
        moved: files put aside or back, by their path in the folder; the rows of a table count as
            the table.
        left: what was to be moved and was not, with the reason.
    """

    moved: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def quarantine(source: FolderData, offenders: Mapping[str, str]) -> Outcome:
    """Puts files and rows of ``source`` aside.

    Args:
        source: the folder; its index is of the state before.
        offenders: keys of pictures, caption files and rows, and why each goes.

    Raises:
        DataError: the folder cannot be written.
    """
    root = source.root
    files, strays = walk(root, source.links)
    pictures = {key for key in files if key.lower().endswith((*READABLE, *UNREADABLE))}
    there = files.keys() | {row.key for row in strays if os.path.lexists(root / row.key)}
    moves = {key: why for key, why in offenders.items() if key in there}
    # A caption that another picture needs as well stays.
    names = Names(files.keys())
    needed = {composed(name) for key in pictures - moves.keys() for name in sidecars(key)}
    for key in list(moves):
        if key in pictures:
            places = [place for place in sidecars(key) if composed(place) not in needed]
            texts = [name for place in places for name in names.find(place)]
            moves |= {name: f"caption of {key}" for name in texts if name not in moves}
    outcome = Outcome()
    rows = _rows(source, pictures, [name for name in files if name not in moves], offenders, moves)
    named = {where for dropped in rows.values() for where in dropped}
    for key in offenders.keys() - moves.keys() - named:
        outcome.left[key] = "is no file or row that can be moved"
    if moves or rows:
        _apply(root, moves, rows, outcome)
    return outcome


def _rows(
    source: FolderData,
    pictures: set[str],
    files: Iterable[str],
    offenders: Mapping[str, str],
    moved: Mapping[str, str],
) -> dict[str, list[str]]:
    """Tables and where their rows stand that are offenders, or whose picture is moved."""
    found: dict[str, list[str]] = {}
    root = Root(source.root, Names(pictures))
    for table in files:
        if PurePosixPath(table).name in TABLES:
            file, columns = source.root / table, (source.image_column, source.caption_column)
            rows = rows_of(root, file, table, *columns)
            out = [where for where, key, *_ in rows if where in offenders or key in moved]
            if out:
                found[table] = out
    return found


def _apply(
    root: Path, moves: Mapping[str, str], rows: Mapping[str, list[str]], outcome: Outcome
) -> None:
    folder = root / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        if not _inside(root, f"{FOLDER}/x"):
            raise DataError(f"{folder} is a link out of the folder, remove it")
        numbers = [int(f.name) for f in folder.iterdir() if f.name.isdecimal()]
        number = max(numbers, default=0) + 1
        with (folder / _LOG).open("a+", encoding="utf-8") as log:
            _cut(log)
            for key, why in moves.items():
                if not _inside(root, key):
                    outcome.left[key] = "lies outside of the folder"
                    continue
                target = f"{FOLDER}/{number}/{key}"
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                _note(log, {"from": key, "to": target, "why": why})
                (root / key).rename(root / target)
                outcome.moved.append(key)
            for table, dropped in rows.items():
                target = f"{FOLDER}/{number}/{table}"
                _replace(root, table, target, dropped, log)
                outcome.moved.append(table)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be moved ({error.strerror}), "
            "`--fix undo` brings back what was"
        ) from error


def _replace(root: Path, table: str, target: str, dropped: list[str], log: TextIO) -> None:
    """Puts a copy of ``table`` aside, and one without the rows in its place, in one step."""
    numbers = {int(where.removeprefix(f"{table}:").split(" ")[0]) for where in dropped}
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(root / table, root / target)
    new = (root / target).with_name(f".{(root / target).name}.new")
    new.write_bytes(without(root / table, numbers))
    why = f"{len(dropped)} rows are taken out"
    _note(log, {"from": table, "to": target, "why": why, "written": _hash(new)})
    new.replace(root / table)


def _cut(log: TextIO) -> None:
    """Takes off a line that was being written when a run was stopped."""
    log.seek(0)
    text = log.read()  # ASCII, so that characters are bytes
    log.truncate(text.rfind("\n") + 1)


def _note(log: TextIO, entry: dict[str, str]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()
    os.fsync(log.fileno())


def undo(root: Path) -> Outcome:
    """Moves everything back that ``quarantine`` put aside, the last first.

    What stands in the way of a file keeps its place, and the file its own; the log then keeps the
    line, so that it can be tried again.

    Raises:
        DataError: there is no log, it is not one of ours, or the folder cannot be written.
    """
    file = root / FOLDER / _LOG
    outcome = Outcome()
    kept: list[dict[str, str]] = []
    try:
        entries = _entries(root, file)
        for entry in reversed(entries):
            aside, place = root / entry["to"], root / entry["from"]
            if not os.path.lexists(aside):  # the step was not taken, or is undone already
                continue
            in_the_way = os.path.lexists(place)
            if "written" in entry and in_the_way:
                in_the_way = _hash(place) not in (entry["written"], _hash(aside))
            if in_the_way:
                outcome.left[entry["from"]] = f"is there again; the old one stays in {entry['to']}"
                kept.insert(0, entry)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.replace(place)
            outcome.moved.append(entry["from"])
        if kept:
            write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))
        else:
            file.unlink()
        _prune(root / FOLDER)
    except OSError as error:
        raise DataError(f"{error.filename or file}: cannot be undone ({error.strerror})") from error
    return outcome


def _entries(root: Path, file: Path) -> list[dict[str, str]]:
    """The steps of the log. A line without an end was being written: its step was never taken."""
    if not file.is_file():
        raise DataError(f"{file}: there is no log, nothing was put aside here")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            entry = parse_json(line, dict[str, str])
            source, target = entry["from"], entry["to"]
            ours = target.startswith(f"{FOLDER}/") and _inside(root, source)
        except (ValueError, KeyError):  # a zero in a name is a ValueError too
            raise DataError(f"{file}:{number}: this is no line of `--fix quarantine`") from None
        if not ours or not _inside(root, target):
            raise DataError(f"{file}:{number}: points out of the folder, it was tampered with")
        found.append(entry)
    return found


def _inside(root: Path, key: str) -> bool:
    """Whether a path below ``root`` stays there, links of its folders followed."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        return False
    real, parent = os.path.realpath(root), os.path.realpath((root / key).parent)
    return os.path.commonpath([real, parent]) == real


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _prune(folder: Path) -> None:
    """Removes empty folders, and unfinished tables, from the quarantine."""
    for below, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name.startswith(".metadata.") and name.endswith(".new"):
                (Path(below) / name).unlink()
        if not os.listdir(below):
            os.rmdir(below)
