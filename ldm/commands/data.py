"""``ldm data``: what is in a data set, and what is wrong with it, before any training."""

from __future__ import annotations

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ldm.commands.cache import cache
from ldm.commands.failure import fail, piped

if TYPE_CHECKING:
    from ldm.data.audit.quarantine import Outcome
    from ldm.data.audit.report import Report
    from ldm.data.audit.texts import Count
    from ldm.data.source import Source

app = typer.Typer(no_args_is_help=True)
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
_DRAWN = ("emoji", "shapes")


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
) -> Source:
    """The source at ``path``, in whatever layout it is; or ``emoji``, ``shapes``.

    Raises:
        DataError: there is nothing that is known.
    """
    from ldm.data.detect import layout
    from ldm.data.emoji import EmojiData
    from ldm.data.folder import FolderData
    from ldm.data.hub import DatasetsData
    from ldm.data.shapes import ShapesData
    from ldm.data.source import DataError
    from ldm.data.table import TableData
    from ldm.data.tar import TarData

    if path in _DRAWN and not Path(path).exists():
        return EmojiData() if path == "emoji" else ShapesData()
    columns = {
        name: value
        for name, value in (("caption_column", caption_column), ("image_column", image_column))
        if value is not None
    }
    kind = layout(path).kind
    classes: dict[str, Any] = {
        "folder": FolderData, "webdataset": TarData, "parquet": TableData, "datasets": DatasetsData,
    }  # fmt: skip
    if kind not in classes:
        raise DataError(f"{path}: {kind} is not read as a whole here: name one of its folders")
    if kind == "webdataset":
        columns.pop("image_column", None)
    return classes[kind](path=path, held_out_fraction=held_out_fraction, **columns)


@app.command()
@piped()
def check(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A folder of pictures; or emoji, shapes.")
    ],
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write all of it as JSON; - is stdout."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings.")] = False,
    size: Annotated[
        int | None, typer.Option(help="Side that is trained at [512; of drawn pictures their own].")
    ] = None,
    step: Annotated[int, typer.Option(help="Step of the aspect-ratio buckets, in pixels.")] = 64,
    max_aspect: Annotated[float, typer.Option(help="Longest side over shortest.")] = 2.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder of the model, to find long captions.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG of some pictures and of the flagged ones.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="The run's held_out_fraction.")
    ] = 0.05,
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

    from ldm.commands import terminal
    from ldm.data.audit.check import Expected
    from ldm.data.audit.check import check as checked
    from ldm.data.buckets import Buckets

    if (fix is Fix.convert) != (out is not None):
        fail("--fix convert and --out need each other")
    if also and fix is not Fix.quarantine:
        fail("--also goes with --fix quarantine")
    for kind in also or ():
        if kind not in MOVABLE:
            fail(f"--also {kind}: not one of {', '.join(MOVABLE)}")
    if not 0 <= held_out <= 1:
        fail(f"--held-out {held_out} is not in [0, 1]")
    # The report names every such picture; Pillow would do so as well, and less clearly.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        source = source_of(
            path,
            caption_column=caption_column,
            image_column=image_column,
            held_out_fraction=held_out,
        )
        if fix is Fix.undo:
            _finish(_undo(path), "moved back", json_out)
        count, limit = _tokens(tokenizer) if tokenizer else (None, 0)
        native = getattr(source, "size", 512)  # of drawn pictures
        expected = Expected(size or native, Buckets(step, max_aspect), count, limit)
        report = checked(source, getattr(source, "kind", "folder"), expected)
        if json_out != "-":
            terminal.show(report)
        if sheet and report.train + report.held_out:
            from ldm.commands.contact import contact_sheet
            from ldm.engine.pictures import save

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


def _tokens(folder: Path) -> tuple[Count, int]:
    """How many tokens texts are, and how many the text encoder sees."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # "longer than the maximum": that is asked
    if not folder.is_dir():
        fail(f"--tokenizer {folder}: there is no such folder")
    loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    limit = loaded.model_max_length
    if limit > 2**20:  # how transformers writes "none"
        fail(f"--tokenizer {folder}: it has no model_max_length, so no text is too long for it")
    return lambda texts: [len(ids) for ids in loaded(list(texts))["input_ids"]], limit


def _fix(fix: Fix, source: Source, report: Report, also: list[str], out: Path | None) -> Outcome:
    from ldm.data.audit.convert import convert
    from ldm.data.audit.quarantine import Outcome, quarantine
    from ldm.data.folder import FolderData

    if fix is Fix.convert:
        assert out is not None
        return Outcome([f"{convert(source, out)} pictures in {out}"])
    if not isinstance(source, FolderData):
        fail("--fix quarantine is for folders of pictures")
    offenders = {}
    for finding in report.findings:
        if finding.severity == "error" or finding.kind in also:
            for key in finding.spare:
                offenders.setdefault(key, finding.what)
    return quarantine(source, offenders)


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
