"""Arguments of a call that draw in another call, or in two: ``enlarge``, ``padding_mask_crop``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ldm.editing.crop import close_up
from ldm.editing.passes import drawn_twice

F = TypeVar("F", bound=Callable[..., Any])


def in_passes(call: F) -> F:
    """``call`` of a pipeline, without those arguments: where one is given, what its pass makes of
    calls with the others.
    """
    signature = inspect.signature(call)

    @wraps(call)
    def drawn(*arguments: Any, **named: Any) -> Any:
        enlarge, padding = (named.pop(name, None) for name in ("enlarge", "padding_mask_crop"))
        if enlarge is None and padding is None:
            return call(*arguments, **named)
        given = signature.bind(*arguments, **named).arguments
        asked = given | given.pop("told", {})
        pipe, prompt = asked.pop("self"), asked.pop("prompt", "")
        if enlarge is not None:
            return drawn_twice(pipe, prompt, enlarge, asked | {"padding_mask_crop": padding})
        edit = {name: asked.pop(name, None) for name in ("image", "mask_image")}
        return close_up(pipe, prompt, **edit, padding_mask_crop=padding, **asked)

    return drawn  # type: ignore[return-value]
