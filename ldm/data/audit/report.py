"""What a check of a source found: its schema, its severity, its exit status.

The JSON of a ``Report`` is an interface: fields are added, but none is taken away or changes its
meaning without a new ``VERSION``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.data.source import Problem

VERSION = 1
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Args:
        kind: its name, which stays: ``"near-duplicates"``.
        severity: an error cannot be trained on, a warning spoils a training, a note says what will
            be done about it.
        what: completes "3 ..." for people.
        cure: what to do; may be "".
        keys: of the pictures or rows, each once, as the source names them.
        details: more about some of the keys.
        groups: keys that belong together; the first of each is the one to keep.
    """

    kind: str
    severity: Severity
    what: str
    cure: str
    keys: Sequence[str]
    details: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[Sequence[str]] = ()

    @property
    def spare(self) -> list[str]:
        """Keys that can go: of groups all but the first."""
        if not self.groups:
            return list(self.keys)
        return [key for group in self.groups for key in group[1:]]

    def json(self) -> dict[str, Any]:
        """As plain types."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "what": self.what,
            "cure": self.cure,
            "count": len(self.keys),
            "keys": list(self.keys),
            "details": dict(self.details),
            "groups": [list(group) for group in self.groups],
        }


@dataclass(frozen=True)
class Report:
    """What is known about a source before it is trained on.

    Args:
        name: of the source.
        kind: of the source: ``"folder"``.
        train: number of pictures that are trained on.
        held_out: number of pictures that are held out.
        findings: errors first.
        unchecked: what was not looked at, and what it would take.
        settings: what the findings depend on.
        aspects: how many pictures have a ratio of width to height in each range, as (name, count).
        buckets: how many pictures go to each bucket, as ((width, height), count); (0, 0) is none.
        sources: name, kind, numbers and weight of each, where there are several.
    """

    name: str
    kind: str
    train: int
    held_out: int
    findings: Sequence[Finding]
    unchecked: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    aspects: Sequence[tuple[str, int]] = ()
    buckets: Sequence[tuple[tuple[int, int], int]] = ()
    sources: Sequence[Mapping[str, Any]] = ()

    @property
    def worst(self) -> Severity | None:
        """The worst severity; None if nothing was found."""
        found = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in found), None)

    def status(self, strict: bool) -> int:
        """Exit status: 2 for errors, 1 for warnings if ``strict``, else 0."""
        return {"error": 2, "warning": int(strict)}.get(self.worst or "", 0)

    def json(self) -> dict[str, Any]:
        """As plain types, stable within a ``VERSION``."""
        return {
            "version": VERSION,
            "source": {"name": self.name, "kind": self.kind},
            "sources": [dict(source) for source in self.sources],
            "settings": dict(self.settings),
            "pictures": {
                "usable": self.train + self.held_out,
                "train": self.train,
                "held_out": self.held_out,
            },
            "counts": {
                severity: sum(finding.severity == severity for finding in self.findings)
                for severity in SEVERITIES
            },
            "findings": [finding.json() for finding in self.findings],
            "unchecked": list(self.unchecked),
            "aspects": [{"range": name, "pictures": count} for name, count in self.aspects],
            "buckets": [
                {"width": width, "height": height, "pictures": count}
                for (width, height), count in self.buckets
            ],
        }


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, warnings, notes; within each as they come."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def of_problems(problems: Sequence[Problem]) -> list[Finding]:
    """Problems that differ only in what their brackets say are one finding; the largest first."""
    alike: dict[tuple[str, str], dict[str, str]] = {}
    for problem in problems:
        bracketed = re.fullmatch(r"(.*?) \((.*)\); (.*)", problem.reason)
        if bracketed:
            what, detail, cure = bracketed.groups()
        else:
            what, _, cure = problem.reason.partition("; ")
            detail = ""
        alike.setdefault((what, cure), {}).setdefault(problem.key, detail)
    findings = []
    for (what, cure), found in sorted(alike.items(), key=lambda entry: -len(entry[1])):
        details = {key: detail for key, detail in found.items() if detail}
        findings.append(Finding(_slug(what), "error", what, cure, list(found), details))
    return findings


def _slug(what: str) -> str:
    """``pictures that cannot be read`` -> ``pictures-that-cannot-be-read``."""
    return re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
