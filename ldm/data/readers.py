"""Pictures by position from files that can only be read on.

    position -> lane (its column of the batch) -> block of the lane -> place in the block, shuffled

A lane reads files of its own, one after another, and hands out what it reads in blocks, each in an
order drawn from ``stream(seed, "lane L", block)``. Files go round in passes, each a permutation of
all files, of which lane l takes every L-th. So which picture comes at a position follows from
(seed, position) and the files alone, on any number of processes. Where each block begins is noted
down in the run folder once it is known, and so a run goes on there without reading what came
before, but for the part of one file.

What a list of pictures gives and a stream cannot: every file has its own number of pictures, so
lanes end a pass at different times, and use counts of two pictures may differ by two. And nothing
is hashed ahead: that the files are the same is known by their names, sizes and commit alone.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict

from ldm.data.collection import describe
from ldm.data.images import ImageTransform
from ldm.data.items import Item
from ldm.data.remote import Block, Picture, Remote
from ldm.data.source import Problem
from ldm.diffusion import stream
from ldm.errors import DataError
from ldm.storage.json import JsonError, parse_json

log = logging.getLogger(__name__)


class Mark(NamedTuple):
    """Where a lane goes on reading.

    Args:
        turn: passes through the data set before.
        file: files of the lane before, in this pass.
        row: rows of the file before.
    """

    turn: int
    file: int
    row: int


_Count = Annotated[int, Field(ge=0)]


class _Note(TypedDict):
    """A line of the notes of a lane."""

    block: _Count
    mark: Annotated[list[_Count], Field(min_length=3, max_length=3)]  # ``Mark``
    skipped: list[Annotated[list[str], Field(min_length=2, max_length=2)]]  # ``Problem``


class _Notes:
    """Where blocks of a lane begin, and what could not be used: lines of a file of the run.

    They follow from the data alone, so that two processes which share a lane write the same.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.marks = {0: Mark(0, 0, 0)}
        for line in lines(file):
            self.marks[line["block"]] = Mark(*line["mark"])

    def before(self, block: int) -> tuple[int, Mark]:
        """The last noted block up to ``block``, and where it begins."""
        found = max(number for number in self.marks if number <= block)
        return found, self.marks[found]

    def add(self, block: int, mark: Mark, problems: Sequence[Problem]) -> None:
        """Where ``block`` begins, and what was passed over in the one before it.

        Raises:
            DataError: it cannot be written down.
        """
        if block in self.marks:
            return
        self.marks[block] = mark
        line = json.dumps({"block": block, "mark": mark, "skipped": problems})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # in front: behind a line that a kill cut off
        except OSError as error:
            raise DataError(f"{self.file}: cannot be written ({error.strerror})") from error


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the notes of a lane."""
    if file.exists():
        for line in file.read_bytes().split(b"\n"):
            try:
                yield parse_json(line, _Note)
            except JsonError:  # cut off by a kill: it is noted again
                continue


class Lane:
    """The pictures of one lane by their number, endlessly; made for going on from one to the next.

    Args:
        files: of the data set.
        number: of the lane.
        of: how many lanes there are.
        length: pictures of a block.
        seed: of the run.
        notes: file for where the blocks begin.
        skip: whether what cannot be used is passed over.
    """

    def __init__(
        self,
        files: Remote,
        number: int,
        *,
        of: int,
        length: int,
        seed: int,
        notes: Path,
        skip: bool,
    ) -> None:
        self.files, self.number, self.of, self.length = files, number, of, length
        self.seed, self.skip, self.notes = seed, skip, _Notes(notes)
        self._blocks: dict[int, Block] = {}  # the last that was asked for
        self._ahead: dict[int, Future[Block]] = {}  # the one behind it
        self._reader: Iterator[tuple[Mark, Picture | Problem]] | None = None
        self._at = -1  # the block that the reader comes to next
        self._lock = threading.Lock()
        # Waiting for a network and decoding leave Python to others: a thread a lane is enough.
        self._pool = ThreadPoolExecutor(1, f"lane {number}")

    def __getitem__(self, turn: int) -> tuple[Block, int]:
        """The block that has picture ``turn`` of the lane, and its place there.

        Raises:
            DataError: it cannot be read, or holds what cannot be used and may not be skipped.
        """
        number, place = divmod(turn, self.length)
        if number not in self._blocks:
            ahead = self._ahead.pop(number, None)
            block = ahead.result() if ahead else self._read(number)
            self._blocks = {number: block}
            self._ahead = {number + 1: self._pool.submit(self._read, number + 1)}
        return self._blocks[number], place

    def _read(self, number: int) -> Block:
        with self._lock:
            if self._at != number or self._reader is None:
                self._at, mark = self.notes.before(number)
                self._reader = self._from(mark)
                if self._at < number:
                    again = (number - self._at) * self.length
                    log.info("lane %d: %d pictures are read again to go on", self.number, again)
            try:
                while self._at < number:
                    self._fill()
                return self._fill()
            except BaseException:
                self._reader = None
                raise

    def _fill(self) -> Block:
        """The next block of the reader, shuffled; notes where the one behind it begins."""
        assert self._reader is not None
        found, problems = list[Picture](), list[Problem]()
        for mark, read in self._reader:
            if isinstance(read, Problem):
                if not self.skip:
                    raise DataError(describe(self.files.data.name, [read]))
                problems.append(read)
            elif not read.example.held_out:
                found.append(read)
            if len(found) == self.length:
                self.notes.add(self._at + 1, mark, problems)
                break
        order = stream(self.seed, f"lane {self.number}", self._at).permutation(self.length)
        self._at += 1
        return Block(self.files.data, [found[n] for n in order.tolist()])

    def _from(self, mark: Mark) -> Iterator[tuple[Mark, Picture | Problem]]:
        """What the lane reads, without end, each with the mark behind it."""
        turn, begun, row = mark
        barren = set[int]()  # files read since the last picture that is trained on
        while True:
            passing = stream(self.seed, "files", turn).permutation(len(self.files))
            for number, file in enumerate(passing[self.number :: self.of].tolist()):
                if number < begun:
                    continue
                used = row > 0
                for read in self.files.read(file, row):
                    row += 1
                    used |= isinstance(read, Picture) and not read.example.held_out
                    yield Mark(turn, number, row), read
                row = 0
                barren = set[int]() if used else barren | {file}
                if len(barren) == len(self.files):
                    raise DataError(f"{self.files.data.name}: no picture is left to train on")
            turn, begun = turn + 1, 0


class LanePlan:
    """The item of every position of a run over a stream.

    Args:
        files: of the data set.
        transform: tells the shape at which networks see a picture.
        batch: images per optimiser step over all processes.
        seed: of the run.
        lanes: places at which it is read, a divisor of ``batch``.
        length: pictures of a block of one lane.
        notes: folder for where the blocks of the lanes begin.
        skip: whether what cannot be used is passed over.
    """

    def __init__(
        self, files: Remote, transform: ImageTransform, *, batch: int, seed: int, lanes: int,
        length: int, notes: Path, skip: bool,
    ) -> None:  # fmt: skip
        self.files, self.transform, self.batch, self.seed = files, transform, batch, seed
        self.count, self.length, self.notes, self.skip = lanes, length, notes, skip
        self.lanes: dict[int, Lane] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What it was made from: another process reads lanes of its own."""
        return {**vars(self), "lanes": {}}

    def __getitem__(self, position: int) -> Item:
        """The item at ``position``, counted in images from the start of the run."""
        step, column = divmod(position, self.batch)
        share = self.batch // self.count
        number, place = divmod(column, share)
        if number not in self.lanes:  # a process has those that it is asked for
            self.lanes[number] = Lane(
                self.files, number, of=self.count, length=self.length, seed=self.seed,
                notes=self.notes / f"lane-{number:04d}.jsonl", skip=self.skip,
            )  # fmt: skip
        block, index = self.lanes[number][step * share + place]
        width, height = self.transform.shapes(block.sizes[index : index + 1])[0].tolist()
        return Item(block, index, (width, height))
