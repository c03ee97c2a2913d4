"""What the pictures of a call are told: prompts and negative prompts, each as a text for all text
towers, as a text for each of them, or as what the towers would say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm.calls.values import shown, texts, whole
from ldm.diffusion import Condition
from ldm.families import Family
from ldm.models.conditioner import Conditioner
from ldm.prompts.windows import SYNTAX, count, written

_FEWEST = 2  # tokens: one, and the end of the text
_ONE = "pass either {prompt} or {prompt}_embeds, not both"


@dataclass(frozen=True)
class Side:
    """The prompts of a call, or its negative prompts, beside what ``prompt`` says.

    Args:
        name: of the argument.
        further: texts for further towers, by their folders.
        said: in place of texts, a row each.
    """

    name: str
    further: Mapping[str, list[str]] = field(default_factory=dict)
    said: Condition | None = None

    @classmethod
    def taken(
        cls, name: str, embeds: Tensor | None, family: Family, network: Any, told: dict[str, Any]
    ) -> Side:
        """Takes its arguments out of ``told``.

        Raises:
            ValueError: the ``family`` has no such arguments, or they do not fit each other or
                ``network``.
        """
        further = dict[str, list[str]]()
        for tower in family.towers[1:]:
            key = f"{name}{tower.part.removeprefix('text_encoder')}"
            given = told.pop(key, None)
            if isinstance(given, str):
                given = [given] if given else None  # as in stock, "" is what the first is told
            if given is not None:
                further[tower.part] = _texts(key, given)
        pooled = told.pop(f"{_no(name)}pooled_prompt_embeds", None) if family.pooled else None
        if embeds is None and pooled is not None:
            raise ValueError(f"{_no(name)}pooled_prompt_embeds needs {name}_embeds beside it")
        if embeds is None:
            return cls(name, further)
        if further:
            raise ValueError(_ONE.format(prompt=name))
        said = [_rows(f"{name}_embeds", embeds, 3, _width(network.config))]
        if family.pooled:
            if pooled is None:
                raise ValueError(
                    f"{name}_embeds needs {_no(name)}pooled_prompt_embeds beside it, of the same"
                    " texts"
                )
            wide = network.config.get("pooled_projection_dim")
            said.append(_rows(f"{_no(name)}pooled_prompt_embeds", pooled, 2, wide))
            if len(pooled) != len(embeds):
                raise ValueError(
                    f"{name}_embeds are of {len(embeds)} texts, {_no(name)}pooled_prompt_embeds of"
                    f" {len(pooled)}"
                )
        return cls(name, said=Condition(said[0], None, said[1] if family.pooled else None))

    def texts(self, given: Any) -> Any:
        """``given``, the argument of this name, or as many empty texts as there is said to."""
        if self.said is not None:
            if given not in (None, ""):
                raise ValueError(_ONE.format(prompt=self.name))
            return [""] * len(self.said)
        return given if given is not None or not self.further else ""


@dataclass(frozen=True)
class Wording:
    """How a call says its prompts.

    Args:
        sides: the prompts and the negative ones.
        skip: layers of CLIP towers that the prompts are read before the usual one, as in stock not
            the negative prompts.
        syntax: the grammar of all texts (``ldm.prompts``); None: each is what it says.
        length: tokens of a T5, be it there or not; None: as ever.
    """

    sides: tuple[Side, Side]
    skip: int | None = None
    syntax: str | None = None
    length: int | None = None

    @classmethod
    def taken(
        cls,
        family: Family,
        network: Any,
        told: dict[str, Any],
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        clip_skip: int | None = None,
        prompt_syntax: str | None = None,
    ) -> Wording:
        """Takes its arguments out of ``told``, those of the call that are not named.

        Raises:
            ValueError: there are no such arguments, or they do not fit each other.
        """
        embeds = {"prompt": prompt_embeds, "negative_prompt": negative_prompt_embeds}
        for name, value in embeds.items():
            if value is not None and not family.towers:
                raise ValueError(f"{name}_embeds: this model reads no text")
        skip = whole("clip_skip", clip_skip, optional=True)
        if skip is not None and not family.skips:
            raise ValueError(f"clip_skip is no argument of a model of the family {family.name}")
        first, second = (Side.taken(n, e, family, network, told) for n, e in embeds.items())
        if prompt_syntax not in (None, SYNTAX):
            raise ValueError(
                f"prompt_syntax must be None or {SYNTAX!r}, not {shown(prompt_syntax)}"
            )
        syntax = prompt_syntax if family.towers else None
        return cls((first, second), skip, syntax, _length(family, told))

    def texts(self, prompt: Any, negative: Any) -> tuple[Any, Any]:
        """The two arguments, with empty texts where something else is said in their place."""
        first, second = self.sides
        return first.texts(prompt), second.texts(negative)


class Texts:
    """The conditions of a call's prompts and negative prompts.

    Args:
        conditioner: what the model's text towers say.
        wording: how the call says them.
        prompts: texts.
        negatives: as many.

    Raises:
        ValueError: some of the wording is not for so many, or for a tower that there is not.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        wording: Wording,
        prompts: list[str],
        negatives: list[str],
    ) -> None:
        self.zeros, self.towers = conditioner.zeros, conditioner.towers
        skip = wording.skip
        ours = conditioner if skip is None else conditioner.mapped(lambda t: t.skipping(skip))
        self._conditioners = ours, conditioner
        self._sides, self._texts = wording.sides, (prompts, negatives)
        for side, own in zip(self._sides, self._texts, strict=True):
            for part, given in side.further.items():
                name = f"{side.name}{part.removeprefix('text_encoder')}"
                if part not in [*self.towers][1:]:
                    raise ValueError(f"{name}: there is no further text encoder to read it")
                if len(given) not in (1, len(own)):
                    raise ValueError(f"{name} has {len(given)} texts for {len(own)} prompts")

        self._passed = [side.said for side in self._sides if side.said is not None]
        self._syntax = syntax = wording.syntax
        lengths = [
            count(tower, self._heard(number, part), syntax)
            for part, tower in self.towers.items()
            for number in range(2)
            if syntax is not None and self._sides[number].said is None
        ]
        self._windows = max(lengths, default=1)
        self._once: dict[tuple[Any, ...], Condition] = {}

    def prompts(self, rows: slice) -> Condition:
        """The condition of the prompts number ``rows``."""
        return self._said(0, rows)

    def negatives(self, rows: slice) -> Condition:
        """The condition of the negative prompts number ``rows``."""
        return self._said(1, rows)

    def _said(self, number: int, rows: slice) -> Condition:
        side = self._sides[number]
        if side.said is not None:
            return side.said.map(lambda x: x[rows])
        cond = self._encoded(number, rows, self._windows)
        if not self._passed:
            return cond
        (passed,) = self._passed
        missing = passed.tokens.shape[1] - cond.tokens.shape[1]
        if missing > 0:  # as many windows as what was passed seems to be
            more = self._encoded(number, rows, self._windows + 1)
            each = more.tokens.shape[1] - cond.tokens.shape[1]
            if each and missing % each == 0:
                cond = self._encoded(number, rows, self._windows + missing // each)
        # Nobody says which of the tokens that were passed are real.
        return replace(cond, mask=None, pooled=None if passed.pooled is None else cond.pooled)

    def _heard(self, number: int, part: str) -> list[str]:
        """What the tower ``part`` is told of a side."""
        own = self._texts[number]
        texts = self._sides[number].further.get(part, own)
        return texts * len(own) if len(texts) == 1 else texts

    def _encoded(self, number: int, rows: slice, windows: int) -> Condition:
        conditioner = self._conditioners[number]
        if self._syntax is not None or windows > 1:
            conditioner = written(conditioner, windows, self._syntax)
        if not self.towers:
            return conditioner.encode(self._texts[number][rows])
        heard = [*zip(*(self._heard(number, part)[rows] for part in self.towers), strict=True)]
        places = {row: place for place, row in enumerate(dict.fromkeys(heard))}  # of each once
        key = number, windows, *places
        if (cond := self._once.get(key)) is None:
            columns = map(list, zip(*places, strict=True))
            both = zip(conditioner.towers.values(), columns, strict=True)
            cond = conditioner.join([tower.encode(column) for tower, column in both])
            if len(places) == 1:  # of many batches: what guidance steers away from is
                self._once[key] = cond
        if len(places) == len(heard):
            return cond
        return cond.map(lambda x: x[torch.tensor([places[row] for row in heard], device=x.device)])


def alike(cond: Condition, null: Condition) -> Condition:
    """``null``; ``ValueError`` where its tokens are of another shape than those of ``cond``."""
    one, other = cond.tokens, null.tokens
    if one is not None and other is not None and one.shape != other.shape:
        raise ValueError(
            f"the prompts are {one.shape[1]} tokens and the negative prompts {other.shape[1]}: pass"
            " both as texts, or prompt_embeds and negative_prompt_embeds of the same length"
        )
    return null


def _length(family: Family, told: dict[str, Any]) -> int | None:
    """``max_sequence_length`` of a call; None: it has none. Where the ``family`` knows none it is
    left in ``told``.
    """
    if family.longest is None:
        return None
    name = "max_sequence_length"
    length = whole(name, told.pop(name, None), most=family.longest, optional=True)
    if length is not None and length < _FEWEST:
        raise ValueError(f"{name} must be at least {_FEWEST}, not {length}")
    return length


def _texts(name: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a text or a list of texts, not {shown(given)}")
    return texts(name, given)


def _rows(name: str, value: Any, dims: int, width: int | None) -> Tensor:
    """``value``; ``ValueError`` unless it is a tensor of rows of ``width``."""
    shape = "n tokens width" if dims == 3 else "n width"
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != dims:
        told = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"{name} must be a tensor of floating-point numbers {shape}, not {told}")
    if not value.numel() or (width is not None and value.shape[-1] != width):
        raise ValueError(f"{name} of shape {tuple(value.shape)}: this model reads rows of {width}")
    return value


def _width(config: Mapping[str, Any]) -> int | None:
    """Of the tokens that a network with ``config`` reads."""
    names = ("encoder_hid_dim", "cross_attention_dim", "joint_attention_dim")
    width = next((config[name] for name in names if config.get(name)), None)
    return width if isinstance(width, int) else None


def _no(name: str) -> str:
    """What the names of tensors begin with beside the argument ``name``."""
    return name.removesuffix("prompt")
