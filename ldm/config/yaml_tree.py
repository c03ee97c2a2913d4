"""YAML as configs are written in it: keys and plain values, bounded, whatever the text holds.

A date stays a text. A number is decimal: in YAML 1.1 ``010`` is 8 and ``1:30`` is 90.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import ConfigError

LONGEST = 2**20
"""Bytes of a file."""
_DEEPEST = 50
_MOST = 100_000  # values, with those that anchors repeat
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_RESOLVED_OTHERWISE = {_TAG + name for name in ("timestamp", "value", "int", "float")}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]{1,16})$")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$")


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which a key that stands twice is an error: one of the two would be lost."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag not in _RESOLVED_OTHERWISE]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A plain value."""
        if node.tag not in _PLAIN:
            problem = f"{node.tag.replace(_TAG, '!!')} is no plain value"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # of more digits than Python reads, !!int x, !!bool x
            told = node.value if len(node.value) < 40 else f"{node.value[:40]}..."
            problem = f"{told!r} cannot be read as {node.tag.removeprefix(_TAG)}"
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        distinct(node)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def distinct(node: yaml.MappingNode) -> None:
    """``yaml.YAMLError`` for a key that is no scalar, or stands twice."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="a key is a list or a mapping", problem_mark=key.start_mark
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark
            )
        seen.add(key.value)


def node_of(text: str) -> yaml.Node | None:
    """The node of ``text``, None of an empty one; ``yaml.YAMLError`` tells what is wrong with it,
    also where it is nested too deep or holds too much.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    finally:
        loader.dispose()
    if node is not None and _values(node, {}, _DEEPEST) > _MOST:
        raise yaml.YAMLError(f"it holds more than {_MOST:,} values")
    return node


def _values(node: yaml.Node, known: dict[int, int], deeper: int) -> int:
    """How many values ``node`` holds, those that anchors repeat counted each time."""
    if not deeper:  # or an anchor that holds itself
        raise yaml.YAMLError("nested too deep")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_values(part, known, deeper - 1) for part in parts)
    return known[id(node)]


def plain_of(node: yaml.Node | None) -> Any:
    """The value of ``node``; ``yaml.YAMLError`` tells what is wrong with it."""
    loader = _Loader("")
    try:
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def problem_of(error: yaml.YAMLError) -> str:
    """What ``error`` says is wrong."""
    said = getattr(error, "problem", None) or getattr(error, "reason", None)
    return said or (str(error.args[0]) if error.args else "it cannot be parsed")


def read(file: str | Path) -> dict[str, Any]:
    """The keys and values of ``file``; ``ConfigError`` names it in one line otherwise."""
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise ConfigError(f"config file {file} is no regular file: write the config into one")
        if about.st_size > LONGEST and stat.S_ISREG(about.st_mode):
            raise ConfigError(f"config file {file} is no config: {about.st_size:,} bytes long")
        tree = plain_of(node_of(Path(file).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {file} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config file {file}{where} cannot be used: {problem_of(error)}"
        ) from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"config file {file} must hold keys and values")
    return tree or {}
