"""A contact sheet of a data set: a spread of its pictures, and those that were found fault with."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from ldm.data.audit.report import Finding, Report
from ldm.data.images import flatten
from ldm.data.items import evenly_spaced
from ldm.data.source import Source
from ldm.evaluation.sheets import sheet

_SIDE = 128
_COLUMNS = 8
_ROWS = 4
_EACH = 4
"""Pictures that are shown of one finding."""
_NAME = 18
"""Characters of a key that fit below a picture."""
_PAPER = (225, 225, 225)


def contact_sheet(source: Source, report: Report) -> Image.Image:
    """Pictures spread over all of ``source`` with their captions; below them pictures of every
    error and warning, the kinds with most pictures first, with what is the matter.

    Args:
        source: with a usable picture at least.
        report: of it.
    """
    numbers = range(len(source.examples))
    rows: list[tuple[Image.Image, str]] = []
    for i in evenly_spaced(numbers, _COLUMNS * _ROWS):
        rows.append((_thumbnail(source, i), source.examples[i].captions[0]))
    flagged = sorted(
        (finding for finding in report.findings if finding.severity != "note"),
        key=lambda finding: (finding.severity != "error", -len(finding.keys)),
    )
    place = {source.examples[i].key: i for i in numbers} if flagged else {}
    cells = [cell for finding in flagged for cell in _cells(source, finding, place)]
    pages = [_page(rows), _page(cells[: _COLUMNS * _ROWS])]
    pages = [page for page in pages if page is not None]
    paper = Image.new("RGB", (pages[0].width, sum(page.height + 8 for page in pages)), _PAPER)
    top = 0
    for page in pages:
        paper.paste(page, (0, top))
        top += page.height + 8
    return paper


def _page(cells: Sequence[tuple[Image.Image, str]]) -> Image.Image | None:
    if not cells:
        return None
    blank = Image.new("RGB", (_SIDE, _SIDE), "white")
    short = -len(cells) % _COLUMNS  # so that every page is as wide
    full = [*cells, *[(blank, "")] * (short if len(cells) < _COLUMNS else 0)]
    pictures, captions = [[picture] for picture, _ in full], [text for _, text in full]
    return sheet(pictures, captions, columns=_COLUMNS, scale=1)


def _cells(
    source: Source, finding: Finding, place: dict[str, int]
) -> list[tuple[Image.Image, str]]:
    shown = finding.groups[0] if finding.groups else finding.keys
    cells = []
    for key in shown[:_EACH]:
        picture = _thumbnail(source, place[key]) if key in place else _crossed_out()
        name = key if len(key) <= _NAME else f"...{key[3 - _NAME :]}"
        cells.append((picture, f"{name} {finding.kind.replace('-', ' ')}"))
    return cells


def _thumbnail(source: Source, index: int) -> Image.Image:
    picture = flatten(source.load(index), (255, 255, 255))
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)  # strips keep a pixel
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
    return ImageOps.pad(fitted, (_SIDE, _SIDE), color=_PAPER)


def _crossed_out() -> Image.Image:
    """In the place of a picture that cannot be shown."""
    picture = Image.new("RGB", (_SIDE, _SIDE), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.line((0, 0, _SIDE, _SIDE), "firebrick", 2)
    pen.line((0, _SIDE, _SIDE, 0), "firebrick", 2)
    return picture
