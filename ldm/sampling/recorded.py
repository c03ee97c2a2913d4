"""What a scheduler does to latents from noise to data, written down once and done again.

    x_s = step(y, x_t):  half a dozen operations on latents, and dozens on numbers of its tables

The numbers are a function of the scheduler's state, which its config and its timesteps determine.
So the first run writes down the operations on latents as they happen, with these numbers as
constants, and later runs do the same operations with the same numbers: their bits are the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from ldm.diffusion import Level
from ldm.sampling.steps import Steps

# What they do to a latent does not depend on its numbers, and they draw no noise unless told to.
_KINDS = frozenset({
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler", "_DDIM", "_DPM2", "_UniPC",
})  # fmt: skip
_WHERE = ("diffusers.schedulers.", "ldm.sampling.")
_aten = torch.ops.aten
# The same operations by the names by which they are called soonest.
_SOON: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.div.Tensor: torch.div,
    _aten.mul.Tensor: torch.mul,
    _aten.sub.Tensor: torch.sub,
}
_KEPT = 64


class _Operation(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    """Which of the arguments are values of the run, and their numbers."""
    options: dict[str, Any]
    found: tuple[int, ...]
    """Numbers of what it returns."""
    several: bool


class _Piece(NamedTuple):
    """What happens between two times that the scheduler is asked."""

    given: tuple[int, ...]
    operations: tuple[_Operation, ...]
    result: int
    gone: tuple[int, ...] = ()
    """Values that nothing asks for afterwards."""

    def __call__(self, values: dict[int, Tensor], *given: Tensor) -> Tensor:
        """The result."""
        values.update(zip(self.given, given, strict=True))
        for function, arguments, places, options, found, several in self.operations:
            filled = list(arguments)
            for index, number in places:
                filled[index] = values[number]
            out = function(*filled, **options)
            if several:
                values.update(zip(found, out, strict=True))
            else:
                values[found[0]] = out
        result = values[self.result]
        for number in self.gone:
            del values[number]
        return result


class _Way(NamedTuple):
    levels: tuple[Level, ...]
    pieces: tuple[_Piece, ...]
    """Of every evaluation the scaling of its input, and the step."""


class _Recorder(TorchDispatchMode):
    """Writes down, while it is entered, what is done to the values that it has numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.able = True
        self.operations: list[_Operation] = []
        self._numbers: Any = WeakIdKeyDictionary()
        self._ids: set[int] = set()  # to ask, of what has none, takes a tenth of the time
        self._count = 0

    def numbered(self, x: Tensor) -> int:
        """The number of ``x`` from here on."""
        self._numbers[x] = self._count
        self._ids.add(id(x))
        self._count += 1
        return self._count - 1

    def number(self, x: Any) -> int | None:
        """That of ``x``, if it has one."""
        return cast("int | None", self._numbers.get(x)) if id(x) in self._ids else None

    def _places(self, arguments: Sequence[Any]) -> dict[int, int]:
        numbers = ((index, self.number(x)) for index, x in enumerate(arguments))
        return {index: number for index, number in numbers if number is not None}

    def __torch_dispatch__(  # names of torch
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See the class."""
        options: dict[str, Any] = kwargs or {}
        out = func(*args, **options)
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self.able = False  # its numbers, or those that it draws, are others the next time
            return out
        function = cast(Callable[..., Any], _SOON.get(func, func))
        arguments, places = tuple(args), self._places(args)
        if options or any(isinstance(x, (list, tuple)) for x in arguments):
            flat, form = tree_flatten((arguments, options))
            within = self._places(flat)
            if len(within) > len(places):  # some are in lists, or named
                function, arguments, places = partial(_called, func, form), tuple(flat), within
                options = {}
        if places:
            tensors = cast(Sequence[Any], out) if isinstance(out, (list, tuple)) else (out,)
            if not all(isinstance(x, Tensor) for x in tensors):
                self.able = False  # what follows may depend on what was asked here
                return out
            # Without what was numbered, which must not be kept.
            kept = tuple(None if i in places else x for i, x in enumerate(arguments))
            found = tuple(self.numbered(x) for x in tensors)
            told = tuple(places.items())
            several = tensors is out
            self.operations.append(_Operation(function, kept, told, options, found, several))
        return out


def _called(function: Callable[..., Any], form: Any, *flat: Any) -> Any:
    arguments, options = tree_unflatten(flat, form)
    return function(*arguments, **options)


class Recording(Steps):
    """The steps of a scheduler, written down as they are taken; ``publish`` is handed them after
    the last one, or None where they cannot be done again.
    """

    def __init__(
        self,
        scheduler: Any,
        timesteps: Tensor,
        options: Mapping[str, Any],
        publish: Callable[[_Way | None], None],
    ) -> None:
        super().__init__(scheduler, timesteps, options)
        self._publish, self._recorder = publish, _Recorder()
        self._levels: list[Level] = []
        self._pieces: list[_Piece] = []

    def seen(self, index: int, x: Tensor) -> tuple[Tensor, Level]:
        """See ``Steps``."""
        x_t, level = self._written(partial(super().seen, index), x)
        self._levels.append(level)
        return x_t, level

    def step(self, index: int, y: Tensor, x: Tensor) -> Tensor:
        """See ``Steps``."""

        def taken(y: Tensor, x: Tensor) -> tuple[Tensor, None]:
            return super(Recording, self).step(index, y, x), None

        x, _ = self._written(taken, y, x)
        if index == len(self.timesteps) - 1:
            able = self._recorder.able
            self._publish(_Way(tuple(self._levels), _used(self._pieces)) if able else None)
        return x

    def _written(
        self, ask: Callable[..., tuple[Tensor, Any]], *given: Tensor
    ) -> tuple[Tensor, Any]:
        recorder = self._recorder
        # What is the same tensor here may be two the next time.
        own = [_aten.alias.default(x) for x in given]
        numbers = tuple(recorder.numbered(x) for x in own)
        recorder.operations = []
        with recorder:
            found, beside = ask(*own)
        result = recorder.number(found)
        if result is None:
            recorder.able = False
        else:
            self._pieces.append(_Piece(numbers, tuple(recorder.operations), result))
        return found, beside


def _used(pieces: Sequence[_Piece]) -> tuple[_Piece, ...]:
    """``pieces`` without operations whose results nobody reads, each with the values that it is the
    last to read.
    """
    read: set[int] = set()
    found: list[_Piece] = []
    for given, operations, result, _ in reversed(pieces):
        later = frozenset(read)
        read.add(result)
        kept: list[_Operation] = []
        for operation in reversed(operations):
            if not read.isdisjoint(operation.found):
                kept.insert(0, operation)
                read.update(number for _, number in operation.places)
        here = {*given, *(number for operation in kept for number in operation.found)}
        here |= {number for operation in kept for _, number in operation.places} | {result}
        found.insert(0, _Piece(given, tuple(kept), result, tuple(here - later)))
    return tuple(found)


class Recorded:
    """The steps of ``way``, done again; in the manner of ``Steps``."""

    def __init__(self, way: _Way, timesteps: Tensor) -> None:
        self.timesteps = timesteps.unbind()
        self._way, self._values = way, dict[int, Tensor]()

    def seen(self, index: int, x: Tensor) -> tuple[Tensor, Level]:
        """See ``Steps``."""
        return self._way.pieces[2 * index](self._values, x), self._way.levels[index]

    def step(self, index: int, y: Tensor, x: Tensor) -> Tensor:
        """See ``Steps``."""
        return self._way.pieces[2 * index + 1](self._values, y, x)


# True of those that were taken once, False of those that cannot be done again.
_WAYS: OrderedDict[Hashable, _Way | bool] = OrderedDict()
_LOCK = threading.Lock()


def steps_of(
    scheduler: Any, timesteps: Tensor, options: Mapping[str, Any], x: Tensor
) -> Steps | Recorded:
    """The steps of a ``scheduler`` that is set, for latents like ``x``: taken by itself the first
    time, written down the second, which takes several times as long, and done again from then on.

    Args:
        scheduler: about to take its first step.
        timesteps: those that it goes through.
        options: of its ``step``.
        x: in what it sets out from.
    """
    key = _key(scheduler, timesteps, options, x)
    if key is None:
        return Steps(scheduler, timesteps, options)
    with _LOCK:
        way = _WAYS.get(key)
        _WAYS[key] = True if way is None else way
        _WAYS.move_to_end(key)
        if len(_WAYS) > _KEPT:
            _WAYS.popitem(last=False)
    if isinstance(way, _Way):
        return Recorded(way, timesteps)
    if not way:
        return Steps(scheduler, timesteps, options)

    def publish(way: _Way | None) -> None:
        with _LOCK:
            _WAYS[key] = way or False

    return Recording(scheduler, timesteps, options, publish)


def _key(
    scheduler: Any, timesteps: Tensor, options: Mapping[str, Any], x: Tensor
) -> Hashable | None:
    """What the steps are a function of; None: nobody knows."""
    kind = type(scheduler)
    known = kind.__name__ in _KINDS and kind.__module__.startswith(_WHERE)
    # A tensor of a kind of its own, or under autocast, is another's to watch.
    plain = type(x) is Tensor and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
    if not (known and plain):
        return None
    digest = blake2b(digest_size=32)
    told = {k: v for k, v in options.items() if k != "generator"}  # without noise it is not used
    if not all(_fed(digest.update, part) for part in (vars(scheduler), timesteps, told)):
        return None
    methods = kind.step, getattr(kind, "scale_model_input", None)
    tensors = x.shape, x.dtype, x.device, torch.is_inference_mode_enabled()
    return kind, methods, tensors, digest.digest()


def _fed(feed: Callable[[bytes], None], value: Any) -> bool:
    """Feeds ``value`` on; False: it is nothing whose bytes say all of it."""
    if isinstance(value, Tensor):
        feed(f"{value.dtype} {value.device} {tuple(value.shape)}".encode())
        feed(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        feed(f"{value.dtype} {value.shape}".encode())
        feed(value.tobytes())
    elif isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return all(_fed(feed, part) for item in items for part in item)
    elif isinstance(value, (list, tuple)):
        parts = cast(Sequence[Any], value)
        feed(f"{len(parts)}".encode())
        return all(_fed(feed, part) for part in parts)
    elif value is None or isinstance(value, (bool, int, float, str, Fraction, np.generic)):
        feed(f"{value!r};".encode())
    else:
        return isinstance(value, (torch.device, torch.dtype)) and _fed(feed, str(value))
    return True
