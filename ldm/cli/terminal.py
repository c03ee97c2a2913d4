"""A report of a data set as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ldm.data.audit.check import bucket_sizes
from ldm.data.audit.report import Finding, Report
from ldm.data.buckets import table
from ldm.data.console import PipeConsole
from ldm.data.source import printable

_SHOWN = 3
_BAR = 40
_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}


def show(report: Report) -> None:
    """Prints it: pictures, findings, shapes, buckets, what was not checked."""
    console = PipeConsole(highlight=False, soft_wrap=True)
    usable = report.train + report.held_out
    console.print(
        Text(
            f"{printable(report.name)} ({report.kind}): {usable:,} usable pictures, "
            f"{report.train:,} to train on and {report.held_out:,} held out"
        )
    )
    for source in report.sources:
        console.print(
            Text(
                f"  {printable(source['name'])} ({source['kind']}): {source['train']:,} to train"
                f" on and {source['held_out']:,} held out{_weight(source['weight'])}"
            )
        )
    for finding in report.findings:
        console.print()
        _finding(console, finding)
    if usable:
        console.print("\nwidth : height")
        most = max(count for _, count in report.aspects)
        for name, count in report.aspects:
            bar = "#" * -(-count * _BAR // most)
            console.print(Text(f"{name:>16} {count:>9,} {bar}".rstrip()))
        console.print(f"\nbuckets at size {report.settings['size']}")
        console.print(Text(table(bucket_sizes(report))))
    console.print()
    for what in report.unchecked:
        console.print(Text(f"not checked: {what}"))
    counts = report.json()["counts"]
    console.print(", ".join(f"{count} kinds of {kind}s" for kind, count in counts.items()))


def _weight(weight: float | None) -> str:
    return "" if weight is None else f", weight {weight:g}"


def _finding(console: Console, finding: Finding) -> None:
    style = _STYLE[finding.severity]
    head = Text(f"{finding.severity:<8}", style)
    head.append(f"{len(finding.keys):,} {printable(finding.what)}")
    head.append(f"  [{finding.kind}]", "dim")
    console.print(head)
    if finding.groups:
        lines = [" = ".join(group[:_SHOWN]) + _more(group) for group in finding.groups]
    else:
        lines = list(finding.keys)
    for key, line in zip(finding.keys, lines[:_SHOWN], strict=False):
        detail = finding.details.get(key, "") if not finding.groups else ""
        console.print(
            Text(f"         {printable(line)}{f' ({printable(detail)})' if detail else ''}")
        )
    if len(lines) > _SHOWN:
        console.print(f"         and {len(lines) - _SHOWN:,} more")
    if finding.cure:
        console.print(Text(f"         {printable(finding.cure)}", "italic"))


def _more(group: Sequence[str]) -> str:
    rest = len(group) - _SHOWN
    return f" and {rest:,} more" if rest > 0 else ""
