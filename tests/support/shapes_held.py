"""The type checker that holds calls to the shapes they are annotated with; an int is a float.

Of each function the first calls in a test: the ten thousandth step of a loop shows no other shapes,
and to look at all of them was a third of the time of the laws. A function within another is made
with every call of that one, and always checked in the same way: the checks of the first are kept.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from beartype import BeartypeConf, beartype

CHECKS = 20
"""Of arguments, and of arguments with the result: two for a call."""

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checks: dict[tuple[str, str, str], Callable[..., Any]] = {}
_made: Counter[tuple[str, str]] = Counter()
_resting: list[Callable[..., Any]] = []


def held(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping has made of a signature."""
    name = (function.__module__, function.__qualname__)
    key = (*name, str(function.__annotations__))
    check = _checks[key] = _checks.get(key) or _checked(function)

    @wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        found = check(*arguments, **named)
        _made[name] += 1
        if _made[name] == CHECKS:
            _rest(*name)
        return found

    return counted


def begin() -> None:
    """Holds every call again, in the next test."""
    _made.clear()
    while _resting:
        del _resting.pop().__no_type_check__


def _rest(module: str, qualname: str) -> None:
    """Lets the function of that name go, unless no module has it, as those made in another."""
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = vars(found).get(part)
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        if found is None:
            return
    found.__no_type_check__ = True  # which jaxtyping asks for at every call
    _resting.append(found)
