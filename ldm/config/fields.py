"""What a field of a config may hold, and whether it may change: told by its annotation."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, Union

T = TypeVar("T")


class _Mark:
    """In the annotation of a field."""


_MAY_CHANGE = _Mark()
MayChange = Annotated[T, _MAY_CHANGE]
"""A field whose value may differ between a checkpoint and going on from it, and nothing that the
run is a function of does: where things lie, how often something is looked at, how the work is
split, what a fault leads to.
"""


def may_change(config: type[Any]) -> set[str]:
    """The fields of ``config`` that are ``MayChange``."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {n for n, hint in hints.items() if _MAY_CHANGE in getattr(hint, "__metadata__", ())}


def forms(annotation: Any) -> list[Any]:
    """The types that an annotation admits, one by one, without what is annotated to them."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:  # what follows the type is no type (and may be a dataclass)
        return forms(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [form for part in typing.get_args(annotation) for form in forms(part)]
    return [annotation]


def dataclasses_in(annotation: Any) -> list[Any]:
    """Every dataclass that a field's annotation admits, alone or in a list."""
    found: list[Any] = []
    for form in forms(annotation):
        if isinstance(form, type) and dataclasses.is_dataclass(form):
            found.append(form)
        elif typing.get_origin(form) in (tuple, list):
            found += [d for a in typing.get_args(form) for d in dataclasses_in(a)]
    return list(dict.fromkeys(found))


def kind_of(cls: Any) -> str:
    """What ``kind`` of a dataclass says, also where it may be left out (None)."""
    return cls.kind or typing.get_args(typing.get_args(typing.get_type_hints(cls)["kind"])[0])[0]


def key_of(field: str) -> str:
    """The key of a field: a field whose key is a word of Python (``from``) ends in an
    underscore.
    """
    return field.removesuffix("_")


@cache  # of one config a hundredth of a second
def hints_of(cls: Any) -> Mapping[str, Any]:
    """The annotations of a dataclass by the keys of its fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {key_of(name): hint for name, hint in hints.items()}


def meant(kinds: list[Any], asked: Any) -> Any:
    """The one of several dataclasses whose kind is ``asked``, the first without; None if none."""
    if len(kinds) == 1 or asked is None:
        return kinds[0]
    return next((cls for cls in kinds if kind_of(cls) == asked), None)


def below(annotation: Any, name: str, value: Mapping[str, Any]) -> Any:
    """The annotation of key ``name`` of a field that holds ``value``; None if there is no such key.

    Args:
        annotation: of the field.
        name: a key.
        value: its ``kind`` tells which of several dataclasses is meant; without, any that has the
            key may be.
    """
    kinds = dataclasses_in(annotation)
    if kinds:
        first = meant(kinds, value.get("kind"))
        for cls in [first, *kinds] if first else kinds:
            hints = hints_of(cls)
            if name in hints:
                return hints[name]
    for form in forms(annotation):
        if typing.get_origin(form) is dict:
            return typing.get_args(form)[1]
    return None
