"""One YAML file is one run: reading it, checking every key, and naming what is wrong in one line.

Configs are frozen standard dataclasses validated by pydantic. Many of them are the parts themselves
(``NoiseProcess``, ``Objective``, a data source). YAML reads ``1e-4`` as text; a typed field makes
it a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from ldm.config.fields import dataclasses_in, hints_of, key_of, kind_of, meant
from ldm.config.overrides import put
from ldm.config.yaml_tree import read
from ldm.errors import ConfigError

T = TypeVar("T")
_LISTED = 24  # known keys in a message: all of a part, and not all of a run

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxstring = _short.maxother = _short.maxlong = 120

_UNITS = {"images", "steps", "epochs"}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kM]?)\s*([a-z]+)\s*")


def _parse(text: Any) -> tuple[float, str]:
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    unit = match[3] if match else ""
    unit = unit if unit.endswith("s") else unit + "s"
    if not match or unit not in _UNITS:
        raise ValueError(f"{text!r} is no duration: write '20k steps', '2M images' or '30 epochs'")
    count = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
    if not count <= 1e15:
        raise ValueError("longer than can be counted")
    return count, unit


def _checked(text: Any) -> Any:
    _parse(text)
    return text


def _positive(text: str) -> str:
    if not _parse(text)[0]:
        raise ValueError(f"{text!r} is no interval: it must be longer than nothing")
    return text


_SCHEMA = {
    "type": "string",
    "pattern": r"^\s*\d+(\.\d+)?\s*[kM]?\s*(image|step|epoch)s?\s*$",
    "examples": ["20k steps", "2M images", "30 epochs"],
}
Duration = Annotated[str, BeforeValidator(_checked), WithJsonSchema(_SCHEMA)]
"""A number of optimiser steps, images or epochs: ``"20k steps"``, ``"2M images"``, ``"30
epochs"``."""

Interval = Annotated[Duration, AfterValidator(_positive)]
"""A duration that is not 0."""


def images(duration: str, batch_size: int, epoch: int | None) -> int:
    """``duration`` in images, rounded up to whole batches; ``epoch`` is the images of one epoch.

    Raises:
        ConfigError: it is in epochs, and their length is not known (None).
    """
    count, unit = _parse(duration)
    if unit == "epochs" and epoch is None:
        raise ConfigError(
            f"{duration!r} cannot be told in images: a stream is not counted; write steps or images"
        )
    total = count * {"images": 1, "steps": batch_size, "epochs": epoch or 0}[unit]
    if total > 2**62:
        raise ConfigError(f"{duration!r} is longer than can be counted: {total:.2g} images")
    return -(-round(total) // batch_size) * batch_size


def config_class(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass in which unknown keys are errors."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def load(cls: type[T], file: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """``cls`` from a YAML file and ``a.b=c`` overrides; ``ConfigError`` in one line otherwise."""
    tree = {} if file is None else read(file)
    for text in overrides:
        put(tree, cls, text)
    return validate(cls, tree, where=str(file or "command line"))


def validate(cls: type[T], tree: dict[str, Any], where: str = "config") -> T:
    """``cls`` from a tree of plain values, every error of pydantic told in one line."""
    try:
        _refuse_unknown(cls, tree)
        return _adapter(cls).validate_python(tree)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(tree, error)}") from None


@cache  # it takes a tenth of a second
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def plain(config: Any) -> Any:
    """The config as plain values, as YAML and JSON write them."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {key_of(f.name): plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return config


def _explain(tree: Any, error: ValidationError) -> str:
    """The first of the deepest problems: where a union failed, that of the kind that was meant."""
    problems = [(_path(tree, problem), problem) for problem in error.errors(include_url=False)]
    deepest = max(len(path) for path, _ in problems)
    path, problem = next(item for item in problems if len(item[0]) == deepest)
    key, message = ".".join(path), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"key '{key}.kind' is {context['tag']!r}: known kinds: {context['expected_tags']}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return (
            f"key {'.'.join(path[:-1])!r} has too few values: {_short.repr(list(problem['input']))}"
        )
    if problem["type"] == "missing":
        return f"key {key!r} is required"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"].startswith(("dataclass", "dict", "model_attributes")):
        message = "input should be keys and values"
    message = message.replace("a valid tuple", "a list")
    value = _short.repr(problem["input"])
    return f"key {key!r} is {value}: {message[0].lower()}{message[1:]}"


def _path(tree: Any, problem: Any) -> list[str]:
    """The keys of a problem's location, without the tags of unions: those do not lead on in the
    tree.
    """
    path: list[str] = []
    for part in problem["loc"]:
        try:
            tree = tree[part]
            path.append(str(part))
        except (KeyError, IndexError, TypeError):
            continue
    return [*path, str(problem["loc"][-1])] if problem["type"] == "missing" else path


def _refuse_unknown(annotation: Any, value: Any, path: tuple[str, ...] = ()) -> None:
    """``ConfigError`` for the first key of ``value`` that has no field.

    Where several dataclasses are possible ``kind`` decides, and the first is meant without it.
    """
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _refuse_unknown(annotation, item, (*path, str(number)))
    kinds = dataclasses_in(annotation)
    if not isinstance(value, dict) or not kinds:
        return
    cls = meant(kinds, value.get("kind"))
    if cls is None:
        return  # pydantic lists the kinds
    hints = hints_of(cls)
    fields = [key_of(f.name) for f in dataclasses.fields(cls)]
    for name, item in value.items():
        key = (*path, str(name))
        if name in fields:
            _refuse_unknown(hints[name], item, key)
            continue
        near = difflib.get_close_matches(str(name), fields, 1)
        other = [kind_of(c) for c in kinds if name in {f.name for f in dataclasses.fields(c)}]
        more = len(fields) - _LISTED
        told = fields if more <= 0 else [*fields[:_LISTED], f"and {more} more (configs/README.md)"]
        hint = f"known keys: {', '.join(told)}"
        if nested := _nested(cls, str(name)):
            hint = f"did you mean {'.'.join((*path, *nested))!r}?"
        elif near:
            hint = f"did you mean {'.'.join((*path, near[0]))!r}?"
        elif other:
            hint = f"kind {kind_of(cls)!r} does not have it, kind {other[0]!r} does"
        raise ConfigError(f"unknown key {'.'.join(key)!r}; {hint}")


def _nested(cls: Any, name: str) -> tuple[str, ...]:
    """Where a part of ``cls`` has the field ``name`` (``lr`` is in ``optimizer``), else ()."""
    for field, hint in typing.get_type_hints(cls, include_extras=True).items():
        for part in dataclasses_in(hint):
            if name in {f.name for f in dataclasses.fields(part)}:
                return field, name
    return ()
