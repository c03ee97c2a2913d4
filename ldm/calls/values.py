"""Values of the arguments of a call: a number is a number, whichever library made it.

Everything is checked before anything is drawn, so that what is wrong costs nothing and is told as
one line.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial, wraps
from typing import Any, TypeVar

import torch

from ldm.editing.enlarge import Enlarge
from ldm.editing.pictures import KINDS, is_picture
from ldm.models.tokenizer import unreadable

F = TypeVar("F", bound=Callable[..., Any])

_STEPS = 1_000_000
_PICTURES = 100_000  # their noise is drawn at once
_SIDE = 16_384  # pixels
_SHOWN = 100  # characters of a value


def whole(name: str, value: Any, *, most: int | None = None, optional: bool = False) -> Any:
    """``value`` as an int, or None where it is ``optional``; ``ValueError`` for anything else, a
    bool among it, and for more than ``most``.
    """
    if value is None and optional:
        return None
    try:
        found = _index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {shown(value)}") from None
    if most is not None and found > most:
        raise ValueError(f"{name} must be at most {most:,}, not {found:,}")
    return found


def _index(value: Any) -> int:
    # True is no number of steps, though Python counts with it.
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError
    return operator.index(value)


def real(name: str, value: Any, *, optional: bool = False) -> Any:
    """``value`` as a float, or None where it is ``optional``; ``ValueError`` if it is no finite
    number.
    """
    if value is None and optional:
        return None
    try:
        found = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan  # the errors of arrays and of tensors of several numbers
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number, not {shown(value)}")
    return found


def seeds(name: str, value: Any) -> int | list[int] | None:
    """``value`` as an int or a list of ints, or None; ``ValueError`` if it is none of them."""
    if value is None:
        return None
    plain = isinstance(value, (str, bytes, Mapping, Set)) or not hasattr(value, "__len__")
    try:
        return _index(value) if plain or getattr(value, "ndim", 1) == 0 else [*map(_index, value)]
    except TypeError:
        raise ValueError(
            f"{name} must be a whole number or a list of them, not {shown(value)}"
        ) from None


def texts(name: str, value: Any) -> Any:
    """``value`` as it is; ``ValueError`` if one of its texts holds what is no text."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (wrong := _no_text(text)):
            raise ValueError(f"{name} {shown(text)} {wrong}")
    return value


def _no_text(text: str) -> str | None:
    return "holds a NUL character, which no text does" if "\0" in text else unreadable(text)


def _is_a(name: str, value: Any, *, kind: type | tuple[type, ...], told: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be {told}, not {shown(value)}")
    return value


def _listed(name: str, value: Any, *, least: int) -> Any:
    """``value`` as a list of numbers, whole ones as ints, or None; ``ValueError`` if there is
    another thing in it, or there are less than ``least``.
    """
    if value is None:
        return None
    plain = isinstance(value, (str, bytes, Mapping, Set)) or not hasattr(value, "__len__")
    one = plain or getattr(value, "ndim", 1) == 0  # whose length is not defined
    if one or len(value) < least:
        raise ValueError(
            f"{name} must be a list of at least {least} finite numbers, not {shown(value)}"
        )
    return [each if type(each) is int else real(f"each of {name}", each) for each in value]


def several(name: str, value: Any, count: int) -> Sequence[Any]:
    """Pictures for each of ``count`` networks; lists of a picture for each, one a prompt, are
    turned as in stock.
    """
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        value = [list(pictures) for pictures in zip(*value, strict=False)]
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ValueError(f"{name} must be a list of {count}, one for each network")
    return value


def each(name: str, given: Mapping[str, Any], usual: float, count: int) -> list[float]:
    """The numbers of this name in ``given``, of each of ``count`` networks, or one for all."""
    value = given.get(name, usual)
    many = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(many) != count:
        raise ValueError(f"{name} has {len(many)} numbers for {count} networks")
    return [real(name, one) for one in many]


def _function(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, not {shown(value)}")
    return value


def _names(name: str, value: Any) -> Any:
    known = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    if value is not None and not known:
        raise ValueError(f"{name} must be a list of names, not {shown(value)}")
    return value


def _picture(name: str, value: Any) -> Any:
    if value is not None and not is_picture(value):
        raise ValueError(f"{name} must be {KINDS}, not {shown(value)}")
    return value


def _variation(name: str, value: Any) -> Any:
    """``value`` as (seeds, strength or strengths); ``ValueError`` if it is no such pair."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (seed, strength), not {shown(value)}")
    strength = value[1]
    many = isinstance(strength, (tuple, list))
    found = _listed(f"{name}'s strength", strength, least=1) if many else [real(name, strength)]
    if not all(0 <= each <= 1 for each in found):
        raise ValueError(f"{name}: a strength must lie in [0, 1], not {shown(strength)}")
    if value[0] is None:
        raise ValueError(f"{name} must be (seed, strength), not {shown(value)}")
    return seeds(name, value[0]), [float(each) for each in found] if many else float(found[0])


def _enlarge(name: str, value: Any) -> Enlarge | None:
    if value is None:
        return None
    try:
        return Enlarge.of(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a scale, or like (2, 0.6, 'latent'): {error}, not {shown(value)}"
        ) from None


def _pixels(name: str, value: Any) -> Any:
    found = whole(name, value, most=_SIDE, optional=True)
    if found is not None and found < 0:
        raise ValueError(f"{name} must be 0 pixels or more, not {found}")
    return found


def _generators(name: str, value: Any) -> Any:
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    told = "a torch.Generator or a list of them"
    for one in many:
        _is_a(name, one, kind=torch.Generator, told=told)
    return many if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """``repr`` on one line, cut."""
    line = " ".join(repr(value).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "prompt": texts,
    "negative_prompt": texts,
    "height": partial(whole, most=_SIDE, optional=True),
    "width": partial(whole, most=_SIDE, optional=True),
    "num_inference_steps": partial(whole, most=_STEPS, optional=True),
    "timesteps": partial(_listed, least=1),
    "sigmas": partial(_listed, least=2),
    "guidance_scale": partial(real, optional=True),
    "num_images_per_prompt": partial(whole, most=_PICTURES),
    "generator": _generators,
    "latents": partial(_is_a, kind=torch.Tensor, told="a tensor n c h w"),
    "guidance_rescale": real,
    "sampler": partial(_is_a, kind=str, told="a name of a sampler"),
    "seed": seeds,
    "eta": real,
    "denoising_start": partial(real, optional=True),
    "denoising_end": partial(real, optional=True),
    "image": _picture,
    "mask_image": _picture,
    "strength": partial(real, optional=True),
    "variation": _variation,
    "feather": partial(whole, most=_SIDE, optional=True),
    "padding_mask_crop": _pixels,
    "enlarge": _enlarge,
    "callback_on_step_end": _function,
    "callback_on_step_end_tensor_inputs": _names,
    "guidance": _function,
    "batch_size": partial(whole, optional=True),
}


def checked(call: F) -> F:
    """``call`` on arguments that are of their kind: every whole number is an int, every other a
    float.

    Raises:
        ValueError: in a call, naming the argument that is not; the message is one line.
    """
    signature = inspect.signature(call)

    @wraps(call)
    def checking(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        given = bound.arguments
        for name, check in _CHECKS.items():
            if name in given:
                given[name] = check(name, given[name])
        prompts = given.get("prompt")
        count = (len(prompts) if isinstance(prompts, list) else 1) * given.get(
            "num_images_per_prompt", 1
        )
        if count > _PICTURES:
            raise ValueError(
                f"{count:,} pictures are too many for one call, of {_PICTURES:,} at most: draw them"
                " in several, with further seeds"
            )
        return call(*bound.args, **bound.kwargs)

    return checking  # type: ignore[return-value]
