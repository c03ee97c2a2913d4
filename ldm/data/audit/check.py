"""A source -> a report of all that is odd about it, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ldm.data.audit.duplicates import check_copies
from ldm.data.audit.pictures import aspects, check_sizes, check_traits
from ldm.data.audit.properties import traits_of
from ldm.data.audit.report import Finding, Report, of_problems, ordered
from ldm.data.audit.texts import Count, check_captions
from ldm.data.audit.together import Together
from ldm.data.buckets import Buckets
from ldm.data.cached import CachedSource
from ldm.data.index import Indexed
from ldm.data.source import Source, SourceGroup


@dataclass(frozen=True)
class Expected:
    """What the pictures are to be trained on.

    Args:
        size: side of the training pictures.
        buckets: of their shapes.
        count: of the tokens of texts; None: captions are not measured.
        limit: tokens that the text encoder sees.
        refused: whether a picture that is too small for the buckets ends the run.
    """

    size: int
    buckets: Buckets
    count: Count | None = None
    limit: int = 0
    refused: bool = False


def check(source: Source | SourceGroup | Together, kind: str, expected: Expected) -> Report:
    """Looks at every picture and caption of ``source``; what it found of a picture is kept.

    A source that cannot be read as a whole is a finding as well, ``unusable``.

    Args:
        source: any, or several.
        kind: of the source, for the report.
        expected: what the pictures are to be trained on.

    Raises:
        ValueError: ``expected.size`` is smaller than a step of the buckets.
    """
    expected.buckets.shapes(expected.size)
    if not isinstance(source, Together):
        source = Together(getattr(source, "name", kind), kind, [source])
    settings = {
        "size": expected.size,
        "step": expected.buckets.step,
        "max_aspect": expected.buckets.max_aspect,
        "tokens": expected.limit if expected.count else None,
    }
    findings = [*_unusable(source), *of_problems(source.problems), *_passed_by(source)]
    if not source.sources:
        unchecked = ["everything else"]
        return Report(source.name, kind, 0, 0, findings, unchecked, settings)
    unchecked = []
    if expected.count is None:
        unchecked.append("the length of the captions: no --tokenizer is given")
    if not len(source):
        unchecked.append("anything else: no picture is usable")
        return Report(source.name, kind, 0, 0, ordered(findings), unchecked, settings)
    keys, captions, digests = source.columns()
    sizes, held_out = source.sizes, source.held_out
    findings += check_sizes(keys, sizes, expected.size, expected.buckets, expected.refused)
    findings += check_captions(keys, captions, expected.count, expected.limit)
    if held_out.all():
        findings.append(_nothing_left(source.name, len(held_out)))
    if any(isinstance(one, CachedSource) for one in source.sources):
        told = "a cached set holds none; `ldm data cache --verify` looks at its files"
        unchecked.append(f"the pixels: {told}")
    else:
        both = zip(source.sources, digests, strict=True)
        traits = pa.concat_tables([traits_of(one, mine) for one, mine in both])
        every = [digest for mine in digests for digest in mine]
        findings += check_copies(keys, captions, held_out, every, traits)
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
        source.told(),
    )


def _passed_by(source: Together) -> Iterator[Finding]:
    several = (one.passed_by for one in source.sources if isinstance(one, Indexed))
    others = sum(several, Counter[str]())
    if others:
        what = "kinds of files that are neither pictures that are read nor captions"
        details = {kind: f"{count} files" for kind, count in others.most_common()}
        yield Finding("passed-by", "note", what, "they are passed by", list(details), details)


def _unusable(source: Together) -> Iterator[Finding]:
    if source.unusable:
        cure = "do what the message says and check again"
        what, names = "sources that cannot be read", list(source.unusable)
        yield Finding("unusable", "error", what, cure, names, source.unusable)


def _nothing_left(name: str, count: int) -> Finding:
    what = "sources of which nothing is left to train on"
    cure = "lower held_out_fraction, or add pictures"
    details = {name: f"all {count} pictures are held out"}
    return Finding("nothing-to-train-on", "error", what, cure, [name], details)


def bucket_sizes(report: Report) -> np.ndarray:
    """The bucket of every picture, ``n 2``, as ``ldm.data.buckets.table`` wants them."""
    shapes = np.array([shape for shape, _ in report.buckets], np.int32).reshape(-1, 2)
    return np.repeat(shapes, [count for _, count in report.buckets], axis=0)
