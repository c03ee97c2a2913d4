"""Several sources as one, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ldm.data.content_hash import Captions, Content
from ldm.data.fixed_captions import FixedCaptions
from ldm.data.hints import beside
from ldm.data.images import ImageTransform
from ldm.data.index import Indexed
from ldm.data.items import Items, Planned
from ldm.data.picture import listed
from ldm.data.plan import Plan
from ldm.data.source import Problem, Source, SourceGroup, printable
from ldm.errors import DataError

log = logging.getLogger(__name__)

TOO_SMALL = (
    "pictures smaller than a step of the buckets; remove them, or set images.buckets.upscale"
)


class Collection:
    """All items of ``sources``, in order.

    Args:
        sources: one or several; a group stands for its sources.
        transform: what makes pictures of their size into those that networks see.
        on_bad_sample: ``error`` refuses sources with a picture or row that cannot be used, ``skip``
            leaves those out; they are ``skipped``.

    Raises:
        DataError: nothing is left to train on, or something is bad and may not be skipped.
    """

    def __init__(
        self,
        sources: Source | SourceGroup | Sequence[Source | SourceGroup],
        transform: ImageTransform,
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        given = sources if isinstance(sources, Sequence) else [sources]
        self.sources = list[Source]()
        self._grouped: list[Any] = []
        for source in given:
            if isinstance(source, SourceGroup):
                self._grouped += source.sources
            self.sources += source.sources if isinstance(source, SourceGroup) else [source]
        if not self.sources:
            raise DataError("data: there is no source, name at least one")
        for source in self.sources:
            if source.weight is not None and not source.weight >= 0:
                raise DataError(f"{source.name}: weight {source.weight} is no share, set 0 or more")
        self.skipped: list[tuple[str, Problem]] = []
        columns = []
        for number, source in enumerate(self.sources):
            count = len(source.examples)
            shapes = transform.shapes(source.sizes) if count else np.empty((0, 2), np.int32)
            small = [
                Problem(source.examples[int(i)].key, TOO_SMALL)
                for i in np.flatnonzero((shapes == 0).any(1))
            ]
            problems = [*source.problems, *small]
            if problems and on_bad_sample == "error":
                raise DataError(describe(source.name, problems))
            self.skipped += [(source.name, problem) for problem in problems]
            if isinstance(source, Indexed) and (others := source.passed_by):
                log.info(
                    "%s: %d files are neither pictures that are read nor captions: %s",
                    source.name, others.total(), listed(others),
                )  # fmt: skip
            columns.append((np.full(count, number, np.int16), np.arange(count), shapes))
        number, index, shapes = (np.concatenate(part) for part in zip(*columns, strict=True))
        every = Items(self.sources, number, index, shapes)
        out = np.concatenate([source.held_out for source in self.sources]).astype(bool)
        usable = (every.shapes > 0).all(1)
        self.train, self.held_out = every.where(~out & usable), every.where(out & usable)
        if not any(
            source.weight != 0 and (self.train.source == number).any()
            for number, source in enumerate(self.sources)
        ):
            names = ", ".join(source.name for source in self.sources)
            raise DataError(f"{names}: none of {len(every)} pictures is left to train on")

    def retell(self, captions: Sequence[str]) -> None:
        """Gives every picture these captions in place of its own."""
        told = {id(source): FixedCaptions(source, captions) for source in self.sources}
        self._grouped = [told[id(source)] for source in self._grouped]
        self.sources = [told[id(source)] for source in self.sources]
        for items in (self.train, self.held_out):
            items.sources = self.sources

    @property
    def epoch(self) -> int | None:
        """Pictures to train on; None if nothing has counted them."""
        return len(self.train)

    def plan(self, batch: int, seed: int, window: int | None = None) -> Planned:
        """Which picture comes when, as ``Plan`` has it."""
        return Plan(self.train, batch, seed, window)

    def prompt(self) -> str:
        """A caption to draw."""
        return self.train[0].caption(None)

    @property
    def endless(self) -> bool:
        """Whether some captions vary endlessly, so that they cannot all be encoded ahead."""
        return any(
            source.captions(0) is None for source in self.sources if len(source.examples) > 0
        )

    def summary(self) -> str:
        """Hex SHA-256 of what is trained on: keys, captions and pictures of files, in order."""
        return self._summary

    @cached_property
    def _summary(self) -> str:
        return self._content(self.train)

    def content(self, items: Items) -> str:
        """The same of ``train`` or ``held_out``, with what becomes of the captions."""
        content = self._summary if items is self.train else self._content(items)
        told = [(source.weight, source.grammar) for source in self.sources]
        return hashlib.sha256(f"{content} {told!r}".encode()).hexdigest()

    def _content(self, items: Items) -> str:
        content = Content()
        for number, source in enumerate(self.sources):
            mine = np.zeros(len(source.examples), bool)
            mine[items.index[items.source == number]] = True
            # The settings of a group stand in a file, not in the config.
            told: Any = (source.weight, source.grammar) if source in self._grouped else None
            if hints := beside(source):
                told = told, hints.digest
            content.add(source, mine, told)
        return content.hexdigest()

    def captions(self) -> Captions:
        """Every caption that training can draw (as the files have it, where it varies endlessly),
        and the one that drops it, without repeats.
        """
        return Captions(self.train)


def describe(name: str, problems: Sequence[Problem]) -> str:
    """One line about ``problems`` of one source: how many of the first kind, which, and the
    cure.
    """
    what, _, cure = problems[0].reason.partition("; ")
    alike = [problem.key for problem in problems if problem.reason == problems[0].reason]
    shown = printable(", ".join(alike[:3])) + (", ..." if len(alike) > 3 else "")
    others = len(problems) - len(alike)
    more = f" (and {others} other problems)" if others else ""
    return (
        f"{name}: {len(alike)} {what}: {shown}; {cure}{more}, or set on_bad_sample to skip;"
        f" `ldm data check` lists all"
    )
