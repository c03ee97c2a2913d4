"""``ldm data``: what is in a data set, and what is wrong with it, before any training."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ldm.cli.cache import cache
from ldm.cli.failure import fail, piped
from ldm.cli.tokens import tokens_of

if TYPE_CHECKING:
    from ldm.data.audit.quarantine import Outcome
    from ldm.data.audit.report import Report
    from ldm.data.audit.together import Together
    from ldm.data.folder import FolderData
    from ldm.data.source import Source, SourceGroup

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(cache)

MOVABLE = (
    "exact-duplicates",
    "pixel-duplicates",
    "near-duplicates",
    "blank",
    "small",
    "smaller-than-a-step",
)
"""Findings besides errors whose pictures can be put aside: of copies all but the first."""


class Fix(StrEnum):
    """What ``--fix`` does."""

    quarantine = "quarantine"
    undo = "undo"
    convert = "convert"


@app.callback()
def data() -> None:
    """Looks at data sets."""


def source_of(
    path: str,
    *,
    caption_column: str | None,
    image_column: str | None,
    held_out_fraction: float,
) -> Source | SourceGroup:
    """What is at ``path``, in whatever layout it is; or ``emoji``, ``shapes``, ``digits``.

    Raises:
        DataError: there is nothing that is known, or it has no such column.
    """
    from ldm.config.sources import SOURCES, drawn, layout
    from ldm.errors import DataError

    if path in drawn() and not Path(path).exists():
        return SOURCES[path]()
    kind = layout(path).kind
    known = {field.name for field in fields(SOURCES[kind])}
    columns = {"caption_column": caption_column, "image_column": image_column}
    given = {name: value for name, value in columns.items() if value is not None}
    for name in given.keys() - known:
        raise DataError(f"{path}: --{name.replace('_', '-')} is nothing that {kind} has, leave it")
    if "held_out_fraction" in known:
        given["held_out_fraction"] = held_out_fraction
    return SOURCES[kind](path=path, **given)


@app.command()
@piped()
def check(
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH|[a.b=c]...",
            help="What data.path of a run can be, or emoji, shapes, digits; with --config, changes"
            " to its keys.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of a run: check all that it reads, as it reads it."),
    ] = None,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write all of it as JSON; - is stdout."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings.")] = False,
    size: Annotated[
        int | None, typer.Option(help="Side that is trained at [512; of drawn pictures their own].")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of the aspect-ratio buckets, in pixels [64].")
    ] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="Longest side over shortest [2].")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder of the model, to find long captions.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG of some pictures and of the flagged ones.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="The run's held_out_fraction [0.05].")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Of a table: the captions [text].")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of a table: the pictures [file_name; of parquet: image].")
    ] = None,
    fix: Annotated[
        Fix | None,
        typer.Option(
            help="quarantine: move what has errors, with its captions, to PATH/.quarantine; "
            "undo: move it back; convert: write upright RGB PNGs of all else to --out."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help=f"Quarantine that too: {', '.join(MOVABLE)}."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for --fix convert.")] = None,
) -> None:
    """Reports what is wrong with a data set, and what a training will make of it.

    Every picture is decoded once; a second check of the same pictures takes seconds.

    Exit status: 0 clean (or nothing but notes and warnings), 1 warnings under --strict, 2 errors in
    the data or in the command, 130 after Ctrl-C, 141 if nobody reads on (| head). With --fix: 0 if
    all of it could be done, else 2.
    """
    from PIL import Image

    from ldm.cli import terminal
    from ldm.data.audit.check import Expected
    from ldm.data.audit.check import check as checked
    from ldm.data.audit.together import Together
    from ldm.data.buckets import Buckets

    if (fix is Fix.convert) != (out is not None):
        fail("--fix convert and --out need each other")
    if also and fix is not Fix.quarantine:
        fail("--also goes with --fix quarantine")
    for kind in also or ():
        if kind not in MOVABLE:
            fail(f"--also {kind}: not one of {', '.join(MOVABLE)}")
    if held_out is not None and not 0 <= held_out <= 1:
        fail(f"--held-out {held_out} is not in [0, 1]")
    given = given or []
    if config is None and len(given) != 1:
        fail(f"{len(given)} paths are given: name one, or the config of a run with --config")
    told = {"--caption-column": caption_column, "--image-column": image_column}
    told |= {"--size": size, "--step": step, "--max-aspect": max_aspect, "--held-out": held_out}
    if config is not None and (mine := [name for name, value in told.items() if value is not None]):
        fail(f"{mine[0]} is what the config says: change it with a.b=c behind --config {config}")
    # The report names every such picture; Pillow would do so as well, and less clearly.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        if config is not None and fix is Fix.undo:
            fail("--fix undo goes with a PATH")
        if config is not None:
            from ldm.cli.of_run import of_run

            source, expected = of_run(config, given, tokenizer)
        else:
            data = source_of(
                given[0],
                caption_column=caption_column,
                image_column=image_column,
                held_out_fraction=0.05 if held_out is None else held_out,
            )
            if fix is Fix.undo:
                _finish(_undo(given[0]), "moved back", json_out)
            count, limit = tokens_of(tokenizer) if tokenizer else (None, 0)
            native = getattr(data, "size", 512)  # of drawn pictures
            buckets = Buckets(
                64 if step is None else step, 2.0 if max_aspect is None else max_aspect
            )
            expected = Expected(native if size is None else size, buckets, count, limit)
            source = Together(getattr(data, "name", given[0]), data.kind, [data])
        report = checked(source, source.kind, expected)
        if json_out != "-":
            terminal.show(report)
        if sheet and report.train + report.held_out:
            from ldm.cli.contact import contact_sheet
            from ldm.evaluation.sheets import save

            save(contact_sheet(source, report), sheet)
        if fix is not None:
            outcome = _fix(fix, source, report, also or [], out)
            done = "written" if fix is Fix.convert else "put aside"
            _finish(outcome, done, json_out, report.json())
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        fail(error)
    _write_json(report.json(), json_out)
    raise typer.Exit(report.status(strict))


def _fix(fix: Fix, source: Together, report: Report, also: list[str], out: Path | None) -> Outcome:
    from ldm.data.audit.convert import convert
    from ldm.data.audit.quarantine import Outcome, quarantine

    if fix is Fix.convert:
        assert out is not None
        made = [f"{convert(source, out)} pictures in {out}"] if source.sources else []
        reasons = source.unusable.items()
        return Outcome(made, {name: why.removeprefix(f"{name}: ") for name, why in reasons})
    folder, starts = _folder(source)
    offenders = {}
    for finding in report.findings:
        if finding.severity == "error" or finding.kind in also:
            for key in finding.spare:
                label = next((label for label in starts if key.startswith(label)), "")
                key = starts.get(label, "") + key.removeprefix(label)
                offenders.setdefault(key, finding.what)
    return quarantine(folder, offenders)


def _folder(source: Together) -> tuple[FolderData, dict[str, str]]:
    """The one folder that all of ``source`` lies in, and what keys begin with: in the report and
    in the folder.
    """
    from ldm.data.folder import FolderData
    from ldm.data.sd_scripts import SdScriptsData

    data = source.given[0] if len(source.given) == 1 else None
    if isinstance(data, FolderData):
        return data, {}
    # Folders named by repeats.
    if isinstance(data, SdScriptsData) and Path(data.name).is_dir() and data.reg_path is None:
        labels = [f"{label}/" * source.several for label in source.labels]
        names = [f"{Path(subset.name).name}/" for subset in source.sources]
        return FolderData(data.path, links=data.links), dict(zip(labels, names, strict=True))
    fail("--fix quarantine is for folders of pictures")


def _undo(path: str) -> Outcome:
    from ldm.data.audit.quarantine import undo

    return undo(Path(path).expanduser())


def _finish(
    outcome: Outcome, done: str, json_out: str | None, report: dict[str, Any] | None = None
) -> NoReturn:
    """Says what a fix did, and ends the program."""
    if json_out != "-":
        for line in outcome.moved:
            print(f"{done}: {line}")
        for key, why in outcome.left.items():
            print(f"left: {key} {why}")
    fixed = {"done": outcome.moved, "left": outcome.left}
    _write_json({**(report or {}), "fix": fixed}, json_out)
    raise typer.Exit(2 if outcome.left else 0)


def _write_json(content: dict[str, Any], json_out: str | None) -> None:
    text = json.dumps(content, indent=1)
    if json_out == "-":
        print(text)
    elif json_out is not None:
        Path(json_out).write_text(text + "\n", encoding="utf-8")
