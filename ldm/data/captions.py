"""What becomes of a caption between its file and the text encoder: the grammar of sd-scripts.

    "{prefix} caption {suffix}" -> wildcards -> tags: keep, shuffle, drop -> joined again

A caption is text, or tags between separators. Wildcards are resolved first, so an alternative may
be several tags. Then the tags are shuffled and dropped, except those that are kept. Everything that
is random comes from a generator that is handed in. Whole captions are dropped by the trainer
(``text_dropout``), not here.

The rules are those that sd-scripts documents for its dataset config (docs/config_README-en.md);
``n$$`` is that of dynamic prompts, which sd-scripts has in its sampling script.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ldm.data.ranges import Copies, Count


@dataclass(frozen=True)
class Grammar:
    """Tags, shuffling, wildcards; the config *is* the grammar.

    The tags before the first ``keep_tokens_separator`` and those behind the second stay where they
    are. In a caption without it the first ``keep_tokens`` tags do.

    Args:
        separator: between tags.
        secondary_separator: between tags that are moved and dropped as one, replaced by
            ``separator`` in the end; "" for none.
        shuffle: put the tags into random order.
        keep_tokens: so many tags at the beginning are neither moved nor dropped; those of
            ``prefix`` count.
        keep_tokens_separator: for instance ``|||``; "" for none.
        tag_dropout: share of the other tags that is left out.
        prefix: put before every caption, with a space between.
        suffix: put behind every caption.
        wildcards: resolve ``{a|b}``, and take the lines of a caption file for alternatives.
        variants: texts drawn once and for all per picture, so that they can be cached; 0 draws a
            new one at every use.
    """

    separator: str = ","
    secondary_separator: str = ""
    shuffle: bool = False
    keep_tokens: Count = 0
    keep_tokens_separator: str = ""
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    wildcards: bool = False
    variants: Copies = 0

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator='': tags cannot be told apart without one")
        if not 0 <= self.tag_dropout <= 1:
            raise ValueError(f"tag_dropout={self.tag_dropout} is not in [0, 1]")
        for name in ("keep_tokens", "variants"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it cannot be less than 0")
        names = ("separator", "secondary_separator", "keep_tokens_separator")
        given = [(name, getattr(self, name)) for name in names if getattr(self, name)]
        for number, (name, mark) in enumerate(given):
            for other, longer in [*given[:number], *given[number + 1 :]]:
                if mark in longer:  # whichever is looked for first would tear the other apart
                    raise ValueError(f"{name}={mark!r} is in {other}={longer!r}: choose another")
            if self.wildcards and ("{" in mark or "}" in mark):
                raise ValueError(f"{name}={mark!r} has a brace, which wildcards are made of")

    @property
    def varies(self) -> bool:
        """Whether two draws of one caption can differ."""
        return self.shuffle or self.tag_dropout > 0 or self.wildcards

    def plain(self, text: str) -> str:
        """What evaluation sees, nothing drawn: the first alternative of every wildcard, all tags in
        their order.
        """
        return self._spoken(text, None)

    def draw(self, text: str, draw: np.random.Generator) -> str:
        """What one use of the caption sees; "" if all of it was dropped.

        A pure function of the text and the state of ``draw``.
        """
        return self._spoken(text, draw)

    def _spoken(self, text: str, draw: np.random.Generator | None) -> str:
        text = f"{self.prefix} {text}"
        # "a cat" + ", at night" needs no space between.
        text += self.suffix if self.suffix.startswith(self.separator) else f" {self.suffix}"
        if self.wildcards:
            text = resolve(text, draw)
        if self.shuffle or self.tag_dropout or self.keep_tokens_separator:
            first, free, last = self._parts(text)
            if draw is not None and self.shuffle:
                free = [free[i] for i in draw.permutation(len(free))]
            if draw is not None and self.tag_dropout:
                lots = draw.random(len(free))
                free = [t for t, u in zip(free, lots, strict=True) if u >= self.tag_dropout]
            text = f"{self.separator.rstrip()} ".join([*first, *free, *last])
        if self.secondary_separator:
            text = text.replace(self.secondary_separator, self.separator)
        return " ".join(text.split())

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, those that may move or go, and those that stay behind."""
        mark = self.keep_tokens_separator
        if mark and mark in text:
            first, free, *last = text.split(mark, 2)
            rest = last[0].replace(mark, self.separator) if last else ""
            return self._tags(first), self._tags(free), self._tags(rest)
        tags = self._tags(text)
        return tags[: self.keep_tokens], tags[self.keep_tokens :], []

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.separator) if tag.strip()]


# "2$$", "1-3$$" or "2$$ and $$" before the first alternative. No more digits than Python turns into
# a number.
_COUNT = re.compile(
    r"\s*(?P<low>[0-9]{1,4})(?:-(?P<high>[0-9]{1,4}))?\$\$"
    r"(?:(?P<between>(?:(?!\$\$).)*)\$\$)?(?P<rest>.*)",
    re.DOTALL,
)


def resolve(text: str, draw: np.random.Generator | None) -> str:
    """``text`` with a choice in the place of every wildcard.

    ``{a|b|c}`` is one of the three, ``{2$$a|b|c}`` two different ones in random order with ", "
    between, ``{1-3$$ and $$a|b|c}`` one to three with " and " between; more than there are is all.
    Alternatives may be empty, and may hold wildcards. ``{{`` and ``}}`` are single braces: a pair
    of braces directly around another pair is an escape, so ``{{a|b}}`` is the text ``{a|b}``, but
    ``{{a|b}|c}`` and ``{a|{b|c}}`` are nested. Braces without a partner, ``{}`` and a count like
    ``3-1`` are left as text.

    Args:
        text: any.
        draw: None chooses the first alternative everywhere, and the fewest of a range.
    """
    if "{" not in text and "}" not in text:
        return text
    roles = _roles(text)
    # One list of alternatives for every brace that is open. Innermost choices are made first:
    # without recursion, however deep, and every alternative is as likely as if made from outside.
    levels: list[list[str]] = [[""]]
    splits = [False]
    for token in re.finditer(r"[{}|]|[^{}|]+", text):
        role = roles.get(token.start(), "")
        if role == "skip":
            continue
        if role in ("open", "escape"):
            levels.append([""])
            splits.append(role == "open")
        elif role in ("close", "escaped"):
            options = levels.pop()
            made = _choice(options, draw) if splits.pop() else None
            levels[-1][-1] += "{" + "|".join(options) + "}" if made is None else made
        elif token[0] == "|" and splits[-1]:
            levels[-1].append("")
        else:
            levels[-1][-1] += token[0]
    return levels[0][0]


def _roles(text: str) -> dict[int, str]:
    """What each brace does, by its place; one that is not named is text."""
    partner: dict[int, int] = {}
    waiting: list[int] = []
    lonely: set[int] = set()
    for place, character in enumerate(text):
        if character == "{":
            waiting.append(place)
        elif character == "}" and waiting:
            partner[waiting.pop()] = place
        elif character == "}":
            lonely.add(place)
    roles: dict[int, str] = {}
    for first in sorted(partner):  # from outside to inside
        last = partner[first]
        if first in roles:
            continue
        if partner.get(first + 1) == last - 1:
            roles |= {first: "escape", first + 1: "skip", last - 1: "skip", last: "escaped"}
        elif last > first + 1:
            roles |= {first: "open", last: "close"}
    lonely.update(waiting)
    for place in sorted(lonely):  # doubled ones without a partner are one brace, too
        before = place - 1
        if before in lonely and text[before] == text[place] and before not in roles:
            roles[place] = "skip"
    return roles


def _choice(options: list[str], draw: np.random.Generator | None) -> str | None:
    """What stands for a wildcard, None if its count makes no sense."""
    count = _COUNT.fullmatch(options[0])
    if count is None:
        return options[0 if draw is None else int(draw.integers(len(options)))]
    options = [count["rest"], *options[1:]]
    low = min(int(count["low"]), len(options))
    high = min(int(count["high"] or count["low"]), len(options))
    if int(count["low"]) > int(count["high"] or count["low"]):
        return None
    if draw is None:
        chosen = options[:low]
    else:
        many = int(draw.integers(low, high + 1))
        chosen = [options[i] for i in draw.permutation(len(options))[:many]]
    between = ", " if count["between"] is None else count["between"]
    return between.join(text for text in map(str.strip, chosen) if text)
