"""Prompts in text files: one a line, and lines that stand for a word in others (wildcards)."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.diffusion.streams import stream

_WILDCARD = re.compile(r"__([A-Za-z0-9][\w/-]*?)__")
_MOST = 100  # in one prompt, those within others among them


def lines(file: Path) -> list[str]:
    """The lines of ``file`` that say something.

    Raises:
        ValueError: there is none, or it is no text in UTF-8; the message is one line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {number}: it is no text in UTF-8") from None
    if found := [line.strip() for line in text.split("\n") if line.strip()]:
        return found
    raise ValueError(f"{file}: it is empty")


def drawn(prompt: str, folder: Path, seed: int) -> str:
    """``prompt`` with a line of ``folder/NAME.txt`` for every ``__NAME__``, drawn by ``seed``;
    lines may have such words themselves.

    Raises:
        ValueError: there is no such file, or lines stand for each other without end.
    """
    draw, count = stream(seed, "wildcards", 0), 0
    while found := _WILDCARD.search(prompt):
        count += 1
        if count > _MOST:
            raise ValueError(f"{folder}: __{found[1]}__ stands for itself")
        choice = lines(folder / f"{found[1]}.txt")
        line = choice[int(draw.integers(len(choice)))]
        prompt = prompt[: found.start()] + line + prompt[found.end() :]
    return prompt
