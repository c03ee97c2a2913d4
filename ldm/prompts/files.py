"""Prompts in files: one a line, an object a line with settings beside (.jsonl), and lines that
stand for a word in others (wildcards).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_WILDCARD = re.compile(r"__([A-Za-z0-9][\w/-]*?)__")
_MOST = 100  # in one prompt, those within others among them


def lines(file: Path) -> list[str]:
    """The lines of ``file`` that say something.

    Raises:
        ValueError: there is none, or it is no text in UTF-8; the message is one line.
    """
    return [line for _, line in _numbered(file)]


def objects(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of ``file``, one a line, and the numbers of their lines.

    Raises:
        ValueError: some lines are none, all of which the message names, or as ``lines`` has it.
    """
    found, wrong = list[tuple[int, dict[str, Any]]](), list[str]()
    for number, line in _numbered(file):
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            found.append((number, told))
        else:
            wrong.append(f"line {number}")
    if wrong:
        raise ValueError(
            f'{file}, {", ".join(wrong)}: it is no JSON object, which looks like {{"prompt": "a'
            ' cat", "steps": 20}'
        )
    return found


def _numbered(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {number}: it is no text in UTF-8") from None
    every = enumerate(text.split("\n"), 1)
    if found := [(number, line.strip()) for number, line in every if line.strip()]:
        return found
    raise ValueError(f"{file}: it is empty")


def drawn(prompt: str, folder: Path, seed: int) -> str:
    """``prompt`` with a line of ``folder/NAME.txt`` for every ``__NAME__``, drawn by ``seed``;
    lines may have such words themselves.

    Raises:
        ValueError: there is no such file, or lines stand for each other without end.
    """
    from ldm.diffusion.streams import stream  # only now: --help needs no numpy

    draw, count = stream(seed, "wildcards", 0), 0
    while found := _WILDCARD.search(prompt):
        count += 1
        if count > _MOST:
            raise ValueError(f"{folder}: __{found[1]}__ stands for itself")
        choice = lines(folder / f"{found[1]}.txt")
        line = choice[int(draw.integers(len(choice)))]
        prompt = prompt[: found.start()] + line + prompt[found.end() :]
    return prompt
