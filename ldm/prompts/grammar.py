r"""The prompts of AUTOMATIC1111's web UI as trees.

    (x)        x counts 1.1 times as much        [x]     1 / 1.1 times
    (x:1.3)    1.3 times                         BREAK   what follows is in the next window
    \( \) \[ \] \\                               the character itself

Brackets nest and their factors multiply, so ``((x))`` is 1.21. One that is not closed reaches to
the end, one that was not opened is a character, and brackets may cross: ``(a [b) c]`` is read as
``(a [b])[ c]``. A backslash before another character is nothing. A number is of round brackets
alone; what is no number, as in ``(x:1,3)``, is text.

In two points this is not what the web UI does: there, BREAK within brackets is no break but the
word, and ``(x:1.2.3)`` ends in an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

UP, DOWN = 1.1, 1 / 1.1

_TOKEN = re.compile(
    r"""
      \\(?P<escaped>[\\()\[\]]?)
    | :\s*(?P<factor>[+-]?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*\)
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_SPECIAL = re.compile(r"[\\()\[\]]")
_WORD = "BREAK"
_DEEP = 100
_HIDDEN = "BRE\\AK"
_CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class Words:
    """Text as it is, not empty."""

    text: str


@dataclass(frozen=True)
class Weighted:
    """Of what counts ``factor`` times as much, not empty."""

    parts: tuple[Node, ...]
    factor: float


@dataclass(frozen=True)
class Break:
    """The end of a window."""


Node: TypeAlias = Words | Weighted | Break
Tree: TypeAlias = tuple[Node, ...]

Run: TypeAlias = tuple[str, float]
"""Text and its weight."""


class _Open:
    """A bracket that is being read, and what it holds until it is closed, or crossed."""

    def __init__(self, bracket: str) -> None:
        self.bracket, self.factor = bracket, UP if bracket == "(" else DOWN
        self.parts: list[_Part] = []


@dataclass
class _Piece:
    """What a bracket holds, whose factor may not be known yet."""

    of: _Open
    parts: list[_Part]


_Part: TypeAlias = Words | Break | _Piece


def parse(text: str) -> Tree:
    """The tree of a prompt.

    Raises:
        ValueError: it opens more brackets than anybody means.
    """
    root = _Open("")
    stack = [root]

    def put(words: str) -> None:
        parts = stack[-1].parts
        if words and parts and isinstance(last := parts[-1], Words):
            parts[-1] = Words(last.text + words)
        elif words:
            parts.append(Words(words))

    def flush(number: int) -> None:
        """Ends the pieces of the brackets from ``number`` on."""
        for opened in reversed(stack[number:]):
            outside = stack[stack.index(opened) - 1]
            if opened.parts:
                outside.parts.append(_Piece(opened, opened.parts))
            opened.parts = []

    def close(bracket: str, factor: float) -> bool:
        """Whether there was such a bracket to close; those inside of it go on behind it."""
        opened = [n for n, each in enumerate(stack) if each.bracket == bracket]
        if opened:
            flush(opened[-1])
            stack.pop(opened[-1]).factor = factor
        return bool(opened)

    for found in _TOKEN.finditer(text):
        whole, bracket = found[0], found["bracket"]
        if found["escaped"] is not None:
            put(found["escaped"])
        elif found["factor"] is not None:
            if not close("(", float(found["factor"])):
                put(whole)
        elif bracket in ("(", "["):
            stack.append(_Open(bracket))
            if len(stack) > _DEEP:
                raise ValueError(
                    f"the prompt opens {_DEEP} brackets and closes none: write \\( for one"
                )
        elif bracket in (")", "]"):
            if not close(_CLOSES[bracket], UP if bracket == ")" else DOWN):
                put(whole)
        else:
            for number, words in enumerate(_BREAK.split(whole)):
                if number:
                    stack[-1].parts.append(Break())
                put(words)
    flush(1)
    return _frozen(root.parts)


def _frozen(parts: Sequence[_Part]) -> Tree:
    return tuple(
        Weighted(_frozen(part.parts), part.of.factor) if isinstance(part, _Piece) else part
        for part in parts
    )


def printed(tree: Sequence[Node]) -> str:
    """A prompt of this tree: ``parse(printed(tree)) == tree`` for all that ``parse`` returns."""
    found = []
    for number, node in enumerate(tree):
        if isinstance(node, Break):
            before, after = tree[max(0, number - 1) : number], tree[number + 1 : number + 2]
            found.append(f"{_apart(before, -1)}{_WORD}{_apart(after, 0)}")
        elif isinstance(node, Words):
            found.append(_SPECIAL.sub(r"\\\g<0>", node.text).replace(_WORD, _HIDDEN))
        elif node.factor == DOWN:
            found.append(f"[{printed(node.parts)}]")
        else:
            found.append(f"({printed(node.parts)}:{Decimal(repr(node.factor)):f})")
    return "".join(found)


def _apart(neighbour: Sequence[Node], end: int) -> str:
    """What keeps a break from the ``end`` of its neighbour; white space beside one is lost."""
    spaced = [n for n in neighbour if isinstance(n, Words) and n.text[end].isspace()]
    return "\\" if spaced else " "


def runs(tree: Sequence[Node]) -> list[list[Run]]:
    """The text between breaks, each as runs of one weight: neighbours of the same are one."""
    found: list[list[Run]] = [[]]
    for text, weight in _walked(tree, 1.0):
        here = found[-1]
        if text is None:
            found.append([])
        elif here and here[-1][1] == weight:
            here[-1] = (here[-1][0] + text, weight)
        else:
            here.append((text, weight))
    return found


def _walked(tree: Sequence[Node], weight: float) -> Iterator[tuple[str | None, float]]:
    for node in tree:
        if isinstance(node, Weighted):
            yield from _walked(node.parts, weight * node.factor)
        else:
            yield (node.text if isinstance(node, Words) else None), weight


def weighs(text: str) -> bool:
    """Whether ``text`` means another thing in this grammar than its characters."""
    return parse(text) != ((Words(text),) if text else ())
