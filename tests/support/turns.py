"""Products of which every test run meets each value, and ``--slow`` all of it."""

from collections.abc import Iterable
from typing import Any

import pytest


def turns(*axes: Iterable[Any]) -> list[Any]:
    """What ``parametrize`` takes for every combination of ``axes``. Always run are those in which
    the values of each take turns, as many as the longest has; the others are slow. For axes that
    have little to do with each other. A tuple is several arguments.
    """
    values = [list(axis) for axis in axes]
    always = {tuple(n % len(axis) for axis in values) for n in range(max(map(len, values)))}
    found: list[tuple[tuple[int, ...], list[Any]]] = [((), [])]
    for axis in values:
        found = [
            ((*place, n), [*row, *(value if isinstance(value, tuple) else (value,))])
            for place, row in found
            for n, value in enumerate(axis)
        ]
    return [
        pytest.param(*row, marks=[] if place in always else [pytest.mark.slow])
        for place, row in found
    ]
