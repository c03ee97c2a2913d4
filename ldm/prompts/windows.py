"""Prompts longer than a text tower reads, and with weights: windows, each read alone, side by side.

    tokens of a window = w z mean(z) / mean(w z),    z what the tower says, w weights by token

as AUTOMATIC1111's web UI has it ("Original" emphasis): the mean is that of one window of one
prompt, where the tower leaves one, and where all weights are 1 nothing is multiplied. A window is
full when it holds as many tokens as the tower reads; what follows its last comma moves on to the
next one if the comma is among its last 20 tokens. A prompt of fewer windows than others is filled
up with those of the empty text. A T5 reads its text in one window, whose end is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import T5Config

from ldm.diffusion import Condition
from ldm.models.conditioner import Conditioner, TextConditioner
from ldm.models.lengths import shortened
from ldm.prompts.grammar import Run, parse, runs

log = logging.getLogger(__name__)

SYNTAX = "a1111"
"""The name of the grammar."""
MOST = 32
"""Windows of a prompt."""
_NO_MEAN = 1e-2  # of the root mean square: a mean below it is no size of the tokens
_BACK = 20  # tokens
_SHOWN = 60  # characters of a text in a message

Window = tuple[list[int], list[float]]
"""Ids of tokens without the specials, and their weights."""


class PromptTower(TextConditioner):
    """A text tower that is told prompts in windows.

    Its ids are those of all windows with their specials, and behind them the weights, as bits of
    float64.

    Args:
        tower: the tower, of one window.
        windows: of every prompt, 1 where the tower is a T5.
        syntax: the grammar, ``SYNTAX``; None: brackets are text.
    """

    def __init__(self, tower: TextConditioner, windows: int, syntax: str | None = SYNTAX) -> None:
        vars(self).update(vars(tower))  # the same networks, and the same texts that were told of
        self._tower, self.syntax = tower, syntax
        self.windows = windows if in_windows(tower) else 1
        self.length = self.windows * tower.length

    @property
    def columns(self) -> int:
        """Numbers that ids and weights of a text are."""
        return 2 * self.length

    @property
    def printed(self) -> tuple[str, tuple[Any, ...]]:
        """All that the ids of a text depend on, and how they are read."""
        text, (pad, _, *marks) = self._tower.printed
        return f"{self.syntax} {self.windows}\n{text}", (pad, self.length, *marks)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is, the specials of its windows included."""
        room, least = _room(self._tower), self._tower.length
        found = [_windows(self._tower, text, self.syntax, MOST) for text in texts]
        return [(len(parts) - 1) * least + len(parts[-1][0]) + least - room for parts in found]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Int64 ``b 2 w l``: ids of w windows of l tokens, and their weights."""
        tower, found = self._tower, list[Tensor]()
        before, behind = _specials(tower)
        for text in texts:
            parts = _windows(tower, text, self.syntax, self.windows, tell=True)
            parts += [([], [])] * (self.windows - len(parts))
            ids, weights = list[Tensor](), list[Tensor]()
            for tokens, factors in parts:
                whole = [*before, *tokens, *behind]
                rest = tower.length - len(whole)
                ids.append(torch.tensor(whole + [tower.tokenizer.pad_token_id] * rest))
                factors = [1.0] * len(before) + factors + [1.0] * (len(behind) + rest)
                weights.append(torch.tensor(factors, dtype=torch.float64))
            found.append(torch.cat([*ids, *(w.view(torch.int64) for w in weights)]))
        return torch.stack(found) if found else torch.empty(0, self.columns, dtype=torch.int64)

    def encode_ids(self, ids: Int64[Tensor, "b l"]) -> Condition:
        """Tokens of all windows side by side; what is pooled is that of the first."""
        both = ids.unflatten(1, (2, self.windows, self._tower.length))
        plain, weights = both[:, 0].flatten(0, 1), both[:, 1].contiguous().view(torch.float64)
        said = self._tower.encode_ids(plain)
        shape = (len(ids), self.windows)
        tokens = _weighted(said.tokens, weights.flatten(0, 1).to(said.tokens.device))
        return Condition(
            tokens.unflatten(0, shape).flatten(1, 2),
            None if said.mask is None else said.mask.unflatten(0, shape).flatten(1, 2),
            None if said.pooled is None else said.pooled.unflatten(0, shape)[:, 0],
        )


def in_windows(tower: TextConditioner) -> bool:
    """Whether the tower reads a long text in windows; a T5 does not."""
    return not isinstance(tower.text_encoder.config, T5Config)


def written(conditioner: Conditioner, windows: int, syntax: str | None = SYNTAX) -> Conditioner:
    """``conditioner`` of towers that are told prompts in so many windows."""
    return conditioner.mapped(lambda tower: PromptTower(tower, windows, syntax))


def count(tower: TextConditioner, texts: Sequence[str], syntax: str | None = SYNTAX) -> int:
    """Windows that the longest of ``texts`` fills.

    Raises:
        ValueError: more than ``MOST``.
    """
    if syntax is None or not in_windows(tower):
        return 1
    most = max((len(_windows(tower, text, syntax, MOST + 1)) for text in texts), default=1)
    if most > MOST:
        raise ValueError(f"a prompt is longer than {MOST} windows of {tower.length} tokens")
    return max(1, most)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """``tokens``, ``n l d``, times ``weights``, ``n l``, with the mean that they had; as they are
    where all weights are 1.
    """
    z = tokens.float()
    product = z * weights.float()[..., None]
    had, has = z.mean((1, 2)), product.mean((1, 2))
    least = _NO_MEAN * z.square().mean((1, 2)).sqrt()
    # The norm of a tower may leave hardly a mean, and then one small number over another is any
    # factor: in assets/ldm-small, whose mean is 0.1 % of that, from -4 to 3.
    restored = (had.abs() > least) & (has.abs() > least)
    factor = torch.where(restored, had, 1.0) / torch.where(restored, has, 1.0)
    plain = (weights == 1).all(1)[:, None, None]
    return torch.where(plain, tokens, (product * factor[:, None, None]).to(tokens.dtype))


def _windows(
    tower: TextConditioner, text: str, syntax: str | None, most: int, *, tell: bool = False
) -> list[Window]:
    """The windows of ``text``, the first ``most`` of them."""
    sections = [[(text, 1.0)]] if syntax is None else runs(parse(text))
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # a break at the end begins nothing
    if not in_windows(tower):
        sections, most = [[run for section in _spaced(sections) for run in section]], 1
    found = list[Window]()
    for section in sections:
        found += _filled(tower, section, most)
        if len(found) > most:
            break
    if tell and len(found) > most and tower.worth_a_word(text):
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
        size = f"{most} windows of {tower.length}" if most > 1 else f"{tower.length}"
        log.warning("a text is longer than %s tokens, its end is not seen: %r", size, shown)
    return found[:most]


def _spaced(sections: list[list[Run]]) -> list[list[Run]]:
    """With a blank in place of every break."""
    return [
        [*([(" ", 1.0)] if number else []), *section] for number, section in enumerate(sections)
    ]


def _filled(tower: TextConditioner, section: Sequence[Run], most: int) -> list[Window]:
    """The windows of one section, a few more than ``most`` at most, and one of nothing."""
    room, comma = _room(tower), _tokens(tower, [","], 1)[0][-1:]
    windows: list[Window] = []
    ids: list[int] = []
    weights: list[float] = []
    last = -1  # place of the last comma, -1: none

    def end(place: int) -> None:
        """Ends the window before ``place``; what is behind begins the next one."""
        nonlocal last
        windows.append((ids[:place], weights[:place]))
        del ids[:place], weights[:place]
        last = -1

    read = _tokens(tower, [text for text, _ in section], most)
    for words, (_, weight) in zip(read, section, strict=True):
        place = 0
        while place < len(words) and len(windows) <= most:
            token = words[place]
            further = tower.further(token)  # of a word of several vectors, which stay together
            if [token] == comma:
                last = len(ids)
            elif len(ids) == room and last != -1 and room - last <= _BACK:
                end(last + 1)
            if len(ids) + 1 + further > room and ids:
                end(len(ids))
            ids += words[place : place + 1 + further][:room]
            weights += [weight] * (len(ids) - len(weights))
            place += 1 + further
    if ids or not windows:
        end(len(ids))
    return windows


def _tokens(tower: TextConditioner, texts: list[str], most: int) -> list[list[int]]:
    """Ids of texts, without specials; of very long ones what ``most`` windows can hold."""
    short = [shortened(text, (most + 1) * tower.length) for text in texts]
    return tower.read(short)


def _specials(tower: TextConditioner) -> tuple[list[int], list[int]]:
    """What stands before and behind the tokens of a window."""
    (ids,) = tower.read([""], specials=True)
    return ids[:-1], ids[-1:]


def _room(tower: TextConditioner) -> int:
    """Tokens of a window beside the specials."""
    return tower.length - sum(map(len, _specials(tower)))
