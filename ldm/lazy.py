"""Packages that cost nothing to import: a name is fetched when it is first asked for (PEP 562).

``import torch`` takes seconds, and neither ``--help`` nor a mistake in a config has to wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def named(place: str) -> Any:
    """What ``MODULE:NAME`` stands for."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def front(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` of ``package``.

    Args:
        package: its full name.
        modules: by the module that has them, the names that the package shows, with spaces between.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}

    def fetch(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, value)  # the next time it is there
        return value

    return fetch, lambda: sorted(home)
