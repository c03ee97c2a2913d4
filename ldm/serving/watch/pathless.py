"""What is told of files without where they lie: no absolute path leaves the server."""

from __future__ import annotations

import re
from typing import Any

# A URL stays; what begins with a slash, or with a home, keeps its last part.
_PATH = re.compile(
    r"(\w+://\S+)|(?<![\w/.…])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])*(?=[^\s/\\])"
)


def pathless(text: str) -> str:
    """``text`` with ``…/name`` in place of absolute paths."""
    return _PATH.sub(lambda found: found[1] or "…/", text)


def all_pathless(value: Any) -> Any:
    """``value``, as JSON has it, with the same done to every text in it."""
    if isinstance(value, str):
        return pathless(value)
    if isinstance(value, dict):
        return {pathless(str(key)): all_pathless(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [all_pathless(inside) for inside in value]
    return value
