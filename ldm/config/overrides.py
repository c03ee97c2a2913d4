"""``a.b=c`` of a command line, read by what the field ``a.b`` holds.

A text is taken as it is typed, whatever YAML would make of it: ``data.path=pics #2``, ``run=007``.
Where a list or described fields may stand as well, a value in brackets or braces is one; ``null``
(or nothing) is None where None may stand. Everything else is YAML, all of which has to count.
"""

from __future__ import annotations

import dataclasses
import typing
from types import NoneType
from typing import Any

import yaml

from ldm.config.fields import below, dataclasses_in, forms
from ldm.config.yaml_tree import distinct, node_of, plain_of, problem_of
from ldm.errors import ConfigError

_QUOTED = ("'", '"')


def put(tree: dict[str, Any], cls: type[Any], text: str) -> None:
    """Puts what the override ``text`` says into ``tree``, from which ``cls`` is made.

    Raises:
        ConfigError: it is no override, or no value.
    """
    path, equals, value = text.partition("=")
    told = repr(text if len(text) < 200 else f"{text[:200]}...")
    if not equals or not path:
        raise ConfigError(f"{told} is no override: write key=value, for instance batch_size=16")
    *parents, last = path.split(".")
    node, annotation = tree, cls
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, list):
            raise ConfigError(f"{told}: {parent} is a list; give all of it, {parent}=[...]")
        annotation = below(annotation, parent, node)
        if not isinstance(child, dict):  # a path or null gives way to described fields
            child = node[parent] = {}
        node = child
    try:
        node[last] = value_of(below(annotation, last, node), value)
    except (ValueError, yaml.YAMLError) as error:
        said = problem_of(error) if isinstance(error, yaml.YAMLError) else str(error)
        if value.strip()[:1] in ("[", "{"):
            said += "; a text in it that has # : , [ ] { } needs quotes"
        raise ConfigError(f"{told} cannot be read: {said}") from None


def value_of(annotation: Any, text: str) -> Any:
    """The value that ``text`` stands for in a field of that annotation.

    Raises:
        ValueError: YAML would take a part of it.
        yaml.YAMLError: it is no YAML.
    """
    admits = forms(annotation)
    if str in admits:
        if NoneType in admits and text in ("", "null"):
            return None
        if not _structured(admits, text.strip()):
            return text
    node = node_of(text)
    if node is not None:
        begin, end = node.start_mark.index, node.end_mark.index
        if text[:begin].strip() or text[end:].strip():
            raise ValueError(f"YAML takes {text[begin:end]!r} alone for its value")
    elif text.strip() not in ("", "null"):
        raise ValueError("to YAML it is a comment")
    return _built(annotation, node, text)


def _structured(admits: list[Any], text: str) -> bool:
    """Whether ``text`` is in the brackets or braces of what may stand there besides a text."""
    if text.startswith("{") and text.endswith("}"):
        return any(dataclasses.is_dataclass(form) for form in admits)
    listed = text.startswith("[") and text.endswith("]")
    return listed and any(typing.get_origin(form) is tuple for form in admits)


def _built(annotation: Any, node: yaml.Node | None, source: str) -> Any:
    """The value of ``node`` in a field of that annotation; texts in it are as in ``source``."""
    admits = forms(annotation)
    if isinstance(node, yaml.MappingNode):
        if dataclasses_in(annotation) or any(typing.get_origin(form) is dict for form in admits):
            distinct(node)
            keys = {plain_of(key): value for key, value in node.value}
            kind = keys.get("kind")
            told = {"kind": kind.value} if isinstance(kind, yaml.ScalarNode) else {}
            return {
                key: _built(below(annotation, str(key), told), value, source)
                for key, value in keys.items()
            }
    elif isinstance(node, yaml.SequenceNode):
        for form in admits:
            if typing.get_origin(form) is tuple:
                item = typing.get_args(form)[0]  # of several all are alike
                return [_built(item, part, source) for part in node.value]
    if node is None or str not in admits:
        return plain_of(node)
    if isinstance(node, yaml.ScalarNode):
        empty = NoneType in admits and node.value in ("", "null")
        return None if empty and node.style not in _QUOTED else node.value
    return source[node.start_mark.index : node.end_mark.index]
