"""Sheets of pictures for people to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import NotFiniteError, RunError, ToldElsewhere
from ldm.evaluation.pipe import Pipe
from ldm.models.conditioner import unnamed
from ldm.progress import Progress
from ldm.storage.disk import atomic_write

_READ = 500  # characters of a caption that can fit below a picture


def sheet_name(folder: Path, images: int) -> Path:
    """The file in ``folder`` of the sheet that is drawn after ``images`` images of a run."""
    return folder / f"images-{images:012d}.png"


class _Steps:
    """A pipeline's bar that counts pictures, of which every evaluation is a part."""

    def __init__(self, progress: Progress, each: float) -> None:
        self.progress, self.each = progress, each

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """``count`` more evaluations."""
        self.progress.advance(count * self.each)


@contextmanager
def counted(pipe: Pipe, progress: Progress, count: float) -> Iterator[None]:
    """Inside, a call of ``pipe`` advances ``progress`` by ``count``, step by step."""
    pipe.progress_bar = lambda total: _Steps(progress, count / max(total, 1))
    try:
        yield
    finally:
        del pipe.progress_bar  # of the object: that of its class is there again


def drawn(
    pipe: Pipe,
    prompts: Sequence[str],
    accelerator: Accelerator,
    *,
    what: str,
    seed: int,
    batch: int,
    each: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """What ``pipe`` draws of ``prompts``, ``3 h w`` in [-1, 1] on the host: all processes take
    part, and each knows all of it.

    Picture i is drawn from ``seed + i``, and in the same company however many processes there are:
    each takes whole batches.

    Args:
        pipe: on every process the same.
        prompts: one for each picture.
        accelerator: the processes.
        what: is drawn, for people who wait.
        seed: of the first picture.
        batch: pictures at a time.
        each: further arguments of ``pipe``, of which every picture has its own, ``n ...``.
        settings: further arguments of ``pipe``.

    Raises:
        RunError: what was drawn, by whichever process, is not finite.
    """
    starts = range(0, len(prompts), batch)[accelerator.process_index :: accelerator.num_processes]
    mine: list[tuple[int, Tensor | str]] = []
    with Progress(f"drawing {what}", "pictures", len(prompts)) as progress:
        for start in starts:
            part = list(prompts[start : start + batch])
            own = {name: x[start : start + batch] for name, x in (each or {}).items()}
            # The others are about as far. What a run draws, its captions, is listed elsewhere.
            with counted(pipe, progress, len(prompts) / len(starts)), unnamed():
                try:
                    told = {"seed": seed + start, "output_type": "pt", **own, **settings}
                    images = pipe(part, **told).images
                except NotFiniteError as error:
                    mine.append((start, f"{part[0]!r} was drawn as {error}"))  # the others wait
                    break
            # A picture of its own: what is sent of a part of a tensor is all of it.
            mine += enumerate((x.clone() for x in images.float().cpu() * 2 - 1), start)
    whole = [picture for _, picture in sorted(gather_object(mine), key=itemgetter(0))]
    if wrong := [told for told in whole if isinstance(told, str)]:
        raise RunError(wrong[0]) if accelerator.is_main_process else ToldElsewhere()
    return [picture for picture in whole if isinstance(picture, Tensor)]


def sheet(
    cells: Sequence[Sequence[Image.Image]],
    captions: Sequence[str] | None = None,
    *,
    columns: int,
    scale: int = 2,
) -> Image.Image:
    """Groups of pictures side by side, ``columns`` groups a row, a caption under each group.

    Args:
        cells: groups (a drawn and a true picture, say), all of one size.
        captions: one a group, or None.
        columns: groups a row.
        scale: enlargement, by whole pixels.
    """
    width, height = cells[0][0].width * scale, cells[0][0].height * scale
    group, text = len(cells[0]) * width + 8, 30 if captions else 4
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * group, rows * (height + text)), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(11)
    for n, pictures in enumerate(cells):
        left, top = n % columns * group, n // columns * (height + text)
        for k, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            page.paste(enlarged, (left + k * width, top))
        if captions:
            pen.text(
                (left + 2, top + height), _wrapped(captions[n], group - 10, font), "black", font
            )
    return page


def stacked(pages: Sequence[Image.Image]) -> Image.Image:
    """Pages of any size below each other."""
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), "white")
    top = 0
    for each in pages:
        page.paste(each, (0, top))
        top += each.height
    return page


def _wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text[:_READ].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])


def save(page: Image.Image, file: Path) -> None:
    """Writes a PNG, whole or not at all, making its folder."""
    with atomic_write(file) as partial:
        page.save(partial, format="PNG")
