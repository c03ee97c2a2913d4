"""Which pictures ``ldm sample`` draws: of prompts, of their files and of pictures, each with its
settings; and how they are drawn, call by call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.cli.edits import Edits
from ldm.cli.settings import Call, Drawn, Row, Settings
from ldm.cli.stages import Through
from ldm.cli.story import Story, of_picture
from ldm.progress import Progress
from ldm.prompts import files

_SWEPT: dict[str, Callable[[str], Any]] = {
    "steps": int, "guidance": float, "guidance_rescale": float, "sampler": str, "seed": int,
    "strength": float, "variation_seed": int, "variation_strength": float,
}  # fmt: skip


def again(file: Path, out: Path) -> Story:
    """The story of the picture in ``file``, telling what of it cannot be drawn here.

    Raises:
        ValueError: it has none, or would be overwritten by ``out``.
    """
    found = of_picture(file)
    if out.resolve() == file.resolve():
        raise ValueError(f"--out {out} is the picture itself: name another file")
    if found.left:
        print(f"note: {file}: not drawn as there: {', '.join(found.left)}", file=sys.stderr)
    return found


def of_command(
    prompts: Sequence[str],
    file: Path | None,
    common: Settings,
    story: Story | None,
    given: Collection[str],
) -> list[Row]:
    """The rows that a command asks for; [] where it says no prompt.

    Args:
        prompts: texts.
        file: of more.
        common: settings of all.
        story: of a picture that is drawn again.
        given: names of the options that were passed.

    Raises:
        ValueError: a line of the file or a setting of the picture is none; the message names it.
    """
    rows = [Row(prompt, common) for prompt in prompts]
    rows += of_file(file, common) if file is not None else []
    if story is None:
        return rows
    if file is not None and file.suffix.lower() == ".jsonl":
        raise ValueError("--from takes no .jsonl beside it, whose lines have settings of their own")
    return [story.row(common, given, row.prompt) for row in rows] or [
        story.row(common, given, None)
    ]


def of_file(file: Path, common: Settings) -> list[Row]:
    """Of a text file a prompt a line; of a .jsonl an object a line, of a prompt and of settings in
    place of ``common``.

    Raises:
        ValueError: lines are none, all of which the message names.
    """
    if file.suffix.lower() != ".jsonl":
        return [Row(prompt, common) for prompt in files.lines(file)]
    found, wrong = list[Row](), list[str]()
    for number, told in files.objects(file):
        own = {name: value for name, value in told.items() if name != "prompt"}
        prompt = told.get("prompt", "")
        try:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt must be a text, not {prompt!r}")
            where = f"{file}, line {number}: "
            found.append(Row(prompt, common.but(own), frozenset(own), where))
        except ValueError as error:
            wrong.append(f"line {number}: {str(error).removeprefix('--')}")
    if wrong:
        raise ValueError(f"{file}, {'; '.join(wrong)}")
    return found


def worded(rows: Sequence[Row], folder: Path, count: int) -> list[Row]:
    """``count`` rows of each, each with words of its own for the wildcards of ``folder``, drawn by
    its seed.

    Raises:
        ValueError: there is no such word.
    """
    found = list[Row]()
    for row in rows:
        before = len(found)
        for k, shot in enumerate(row.shots(before, count)):
            seed = row.settings.seed + k + (0 if "seed" in row.own else before)
            text = files.drawn(row.prompt, folder, seed)
            own = row.own | {"seed", "variation_seed"}
            found.append(replace(row, prompt=text, settings=shot, own=own))
    return found


def axis(text: str) -> tuple[str, list[Any]]:
    """``NAME=VALUE,...`` as the name of a setting and its values.

    Raises:
        ValueError: there is no such setting to sweep over, or no such value of it.
    """
    name, _, told = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in _SWEPT:
        raise ValueError(f"--sweep must look like NAME=4,8,16 of {', '.join(_SWEPT)}, not {text!r}")
    try:
        return name, [_SWEPT[name](value.strip()) for value in told.split(",")]
    except ValueError:
        raise ValueError(f"--sweep {text}: a value is no number") from None


def swept(rows: Sequence[Row], axes: Sequence[tuple[str, list[Any]]]) -> list[Row]:
    """``rows``, each with all values of ``axes``, the first the fastest, and the same seed.

    Raises:
        ValueError: a value is none of its setting.
    """
    if not axes:
        return list(rows)
    found = list[Row]()
    for row in rows:
        for values in itertools.product(*(values for _, values in reversed(axes))):
            told = dict(zip((name for name, _ in axes), reversed(values), strict=True))
            label = ", ".join(f"{name} {value}" for name, value in told.items())
            label = label if len(rows) == 1 else f"{label}: {row.prompt}"
            own, settings = row.own | {"seed", "variation_seed"}, row.settings.but(told)
            found.append(replace(row, settings=settings, own=own, company=None, label=label))
    return found


def drawn(
    pipe: Any, calls: Sequence[Call], edit: Edits, batch: int, through: Through | None = None
) -> Iterator[Drawn]:
    """The pictures of ``calls`` as they are drawn, ``batch`` at a time, ``through`` several models
    of which ``pipe`` is the first, if there are.

    Raises:
        ValueError: one cannot be drawn so; the message begins with where that was asked for.
    """
    from ldm.evaluation import sheets

    with Progress("drawing", "pictures", sum(len(call.shots) for call in calls)) as progress:
        for call in calls:
            own = edit.of(call.shots[0])
            pipes = through.stages if through else [pipe]
            passes = len(pipes) if call.shots[0].enlarge is None else 2
            try:
                with ExitStack() as counting:
                    for one in pipes:
                        share = len(call.shots) / passes
                        counting.enter_context(sheets.counted(one, progress, share))
                    asked, before = call.asked(pipe, own, batch), list[Any]()
                    if through:
                        first = call.shots[0]
                        images, before = through.draw(
                            asked, steps=first.steps, guidance=first.guidance, sampler=first.sampler
                        )
                    else:
                        images = pipe(**asked).images
            except ValueError as error:
                raise ValueError(f"{call.where}{error}") from error
            for n, made in enumerate(call.told(pipe, own, batch, images)):
                yield replace(made, before=tuple(stage[n] for stage in before))
