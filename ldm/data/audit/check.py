"""A source -> a report of all that is odd about it, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ldm.data.audit.copies import check_copies
from ldm.data.audit.pictures import aspects, check_sizes, check_traits
from ldm.data.audit.report import Finding, Report, of_problems, ordered
from ldm.data.audit.texts import Count, check_captions
from ldm.data.audit.traits import traits_of
from ldm.data.buckets import Buckets
from ldm.data.index import Indexed
from ldm.data.rows import Rows
from ldm.data.source import DataError, Source


@dataclass(frozen=True)
class Expected:
    """What the pictures are to be trained on.

    Args:
        size: side of the training pictures.
        buckets: of their shapes.
        count: of the tokens of texts; None: captions are not measured.
        limit: tokens that the text encoder sees.
    """

    size: int
    buckets: Buckets
    count: Count | None = None
    limit: int = 0


def check(source: Source, kind: str, expected: Expected) -> Report:
    """Looks at every picture and caption of ``source``; what it found of a picture is kept.

    A source that cannot be read as a whole is a finding as well, ``unusable``.

    Args:
        source: any.
        kind: of the source, for the report.
        expected: what the pictures are to be trained on.

    Raises:
        ValueError: ``expected.size`` is smaller than a step of the buckets.
    """
    expected.buckets.shapes(expected.size)
    settings = {
        "size": expected.size,
        "step": expected.buckets.step,
        "max_aspect": expected.buckets.max_aspect,
        "tokens": expected.limit if expected.count else None,
    }
    try:
        return _check(source, kind, expected, settings)
    except DataError as error:
        cure = "do what the message says and check again"
        found = Finding(
            "unusable", "error", "source that cannot be read", cure, [source.name],
            {source.name: str(error)},
        )  # fmt: skip
        return Report(source.name, kind, 0, 0, [found], ["everything else"], settings)


def _check(source: Source, kind: str, expected: Expected, settings: dict) -> Report:
    findings = [*of_problems(source.problems), *_passed_by(source)]
    unchecked = []
    if expected.count is None:
        unchecked.append("the length of the captions: no --tokenizer is given")
    keys, captions, digests = _columns(source)
    if not keys:
        unchecked.append("anything else: no picture is usable")
        return Report(source.name, kind, 0, 0, ordered(findings), unchecked, settings)
    sizes, held_out = source.sizes, source.held_out
    traits = traits_of(source, digests)
    findings += check_sizes(keys, sizes, expected.size, expected.buckets)
    findings += check_copies(keys, captions, held_out, digests, traits)
    findings += check_captions(keys, captions, expected.count, expected.limit)
    findings += check_traits(keys, traits)
    assigned = Counter(map(tuple, expected.buckets.assign(sizes, expected.size).tolist()))
    buckets = sorted(assigned.items(), key=lambda entry: entry[0][0] / (entry[0][1] or 1))
    return Report(
        source.name,
        kind,
        int((~held_out).sum()),
        int(held_out.sum()),
        ordered(findings),
        unchecked,
        settings,
        aspects(sizes),
        buckets,
    )


def _passed_by(source: Source) -> Iterator[Finding]:
    others = source.passed_by if isinstance(source, Indexed) else None
    if others:
        what = "kinds of files that are neither pictures that are read nor captions"
        details = {kind: f"{count} files" for kind, count in others.most_common()}
        yield Finding("passed-by", "note", what, "they are passed by", list(details), details)


def _columns(source: Source) -> tuple[list[str], list[tuple[str, ...]], list[bytes]]:
    """Key, captions and digest of every example."""
    if isinstance(source.examples, Rows):
        rows = list(source.examples.scan())
    else:
        rows = [
            (example.key, example.captions, bytes.fromhex(source.digest(i)))
            for i, example in enumerate(source.examples)
        ]
    keys, captions, digests = ([row[i] for row in rows] for i in range(3))
    return keys, captions, digests


def bucket_sizes(report: Report) -> np.ndarray:
    """The bucket of every picture, ``n 2``, as ``ldm.data.buckets.table`` wants them."""
    shapes = np.array([shape for shape, _ in report.buckets], np.int32).reshape(-1, 2)
    return np.repeat(shapes, [count for _, count in report.buckets], axis=0)
