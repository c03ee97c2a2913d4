"""A data set that is streamed, in the place of a list of pictures."""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.data.collection import Collection
from ldm.data.hub import DatasetsData, Streaming
from ldm.data.images import ImageTransform
from ldm.data.items import Items
from ldm.data.readers import LanePlan, lines
from ldm.data.remote import Block, Picture, Remote
from ldm.data.source import Problem
from ldm.errors import DataError


class StreamCollection(Collection):
    """A data set that is streamed, where a list of pictures would be.

    Args:
        data: with ``streaming``.
        transform: without buckets.
        on_bad_sample: ``error`` ends the run at what cannot be used, ``skip`` passes over it.
        batch: images per optimiser step over all processes.
        seed: of the run.
        run: folder of the run.
        held_out: how many held-out pictures are looked for.

    Raises:
        DataError: it cannot be opened.
    """

    epoch = None
    """Unknown: nothing has counted the pictures."""

    def __init__(
        self, data: DatasetsData, transform: ImageTransform,
        on_bad_sample: Literal["error", "skip"], *, batch: int, seed: int, run: Path, held_out: int,
    ) -> None:  # fmt: skip
        self.data, self.files, self.sources = data, Remote(data), []
        self.transform, self.skip, self.wanted = transform, on_bad_sample == "skip", held_out
        said = data.streaming if isinstance(data.streaming, Streaming) else Streaming()
        most = min(said.lanes, len(self.files))
        self.lanes = next(n for n in range(most, 0, -1) if batch % n == 0)
        self.length = max(1, said.shuffle // self.lanes)
        self.batch, self.seed = batch, seed
        about = (self.summary(), seed, self.lanes, self.length, data.held_out_fraction)
        about = (*about, data.config, data.split, data.image_column, data.caption_column)
        name = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        self.notes = run / "stream" / name  # notes on other files are none on these

    def plan(self, batch: int, seed: int, window: int | None = None) -> LanePlan:
        """Which picture comes when; only of the batch and the seed that it was made for."""
        if (batch, seed, window) != (self.batch, self.seed, None):
            raise ValueError("a stream is planned for one batch and seed, and without a window")
        return LanePlan(
            self.files, self.transform, batch=batch, seed=seed, lanes=self.lanes,
            length=self.length, notes=self.notes, skip=self.skip,
        )  # fmt: skip

    @property
    def train(self) -> Items:
        """There is none. Raises ``DataError``."""
        raise DataError(
            f"{self.data.name}: a stream has no list of its pictures, which is needed here; leave"
            " out data.streaming"
        )

    @cached_property
    def held_out(self) -> Items:
        """The first that are held out, read from the files in their own order, in memory."""
        every = (read for file in range(len(self.files)) for read in self.files.read(file))
        some = (r for r in every if isinstance(r, Picture) and r.example.held_out)
        wanted = self.wanted if self.data.held_out_fraction else 0
        block = Block(self.data, list(islice(some, wanted)))
        count = len(block.examples)
        shapes = self.transform.shapes(block.sizes)
        return Items([block], np.zeros(count, np.int16), np.arange(count), shapes)

    def prompt(self) -> str:
        """A caption."""
        held_out = self.held_out
        if len(held_out):
            return held_out[0].caption(None)
        every = (read for file in range(len(self.files)) for read in self.files.read(file))
        found = next((r for r in every if isinstance(r, Picture)), None)
        return Block(self.data, [found]).caption(0, None) if found else ""

    @property
    def skipped(self) -> list[tuple[str, Problem]]:
        """What has been passed over by now, each once."""
        found: dict[str, Problem] = {}
        for file in sorted(self.notes.glob("lane-*.jsonl")):
            for line in lines(file):
                found |= {key: Problem(key, reason) for key, reason in line["skipped"]}
        return [(self.data.name, problem) for problem in found.values()]

    @property
    def endless(self) -> bool:
        """Whether captions cannot all be encoded ahead: no stream's can."""
        return True

    def summary(self) -> str:
        """Hex SHA-256 of what its files are called and how long they are, or of their commit."""
        return hashlib.sha256(self.files.about.encode()).hexdigest()
