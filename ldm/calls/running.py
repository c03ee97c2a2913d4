"""A call of the pipeline while it runs: what a callback reads and sets, and whether its numbers are
numbers.

Stock keeps the scheduler, the guidance scale and the wish to stop on the pipeline itself, where two
calls at once would overwrite each other's. Here they are a call's own: on the pipeline, the names
stand for those of the call that asks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.calls.values import real
from ldm.diffusion import Condition, Denoiser, Level, Prediction, Predictor
from ldm.errors import NotFiniteError
from ldm.guidance import Chain, ClassifierFree, Guidance

_TRY = "try another sampler, more steps or less guidance"


class Interrupted(Exception):
    """A callback asked to stop.

    Args:
        latent: as far as it has come.
    """

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


class Watch:
    """Whether numbers are finite, asked where they lie: nobody waits for a device before the
    end.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, nn.Module | None, Tensor]] = []

    def see(self, x: Tensor, where: str, network: nn.Module | None = None) -> None:
        """Remembers of ``x`` what came from ``network``, if from one, at ``where``: its sum, which
        is finite if all of it is, in one pass over it where to ask all of it takes five.
        """
        least = torch.promote_types(x.dtype, torch.float32)  # which halves do not overflow
        self._seen.append((where, network, x.sum(dtype=least)))

    def check(self) -> None:
        """``NotFiniteError`` where something was not, naming the first place and a way out."""
        if not self._seen:
            return
        device = self._seen[-1][2].device
        finite = torch.stack([total.to(device, torch.float32) for _, _, total in self._seen])
        finite = finite.isfinite()
        if bool(finite.all()):
            return
        where, network, _ = self._seen[int(finite.int().argmin())]
        raise NotFiniteError(f"not a picture, but nan or inf: it arose in {where}{_cause(network)}")


def _cause(network: nn.Module | None) -> str:
    if network is None:
        return ""
    named = itertools.chain(network.named_parameters(), network.named_buffers())
    for name, value in named:
        if value.device.type != "meta" and not bool(value.isfinite().all()):
            return f", whose {name} holds nan or inf: the file that it is from is damaged"
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float16:
        return ", in float16, which ends at 65,504: use bfloat16 or float32"
    if dtype == torch.bfloat16:
        return ", in bfloat16: try float32, another sampler or less guidance"
    return f"; its weights are finite: {_TRY}"


@dataclass(eq=False)
class Call:
    """A call that runs.

    Args:
        pipeline: of which.
        guidance_scale: of classifier-free guidance, now.
        guidance_rescale: the same.
        guidance: what was passed in place of these two.
        callback: called after every evaluation.
        inputs: names of the tensors that it is handed.
        dtype: of those tensors.
        offers: which of them are parts of a condition, as ``Drawing.offers`` has it.
    """

    pipeline: Any
    guidance_scale: float
    guidance_rescale: float
    guidance: Guidance | None
    callback: Any
    inputs: Sequence[str]
    dtype: torch.dtype
    offers: Mapping[str, str] = field(default_factory=dict)
    num_timesteps: int = 0
    scheduler: Any = None
    interrupt: bool = False
    cond: Condition = field(default_factory=Condition)
    null: Condition | None = None
    """Of the batch that is drawn; None: nothing has asked for it yet."""
    watch: Watch = field(default_factory=Watch)
    thread: int = field(default_factory=threading.get_ident)
    _done: int = 0
    _encode_null: Callable[[], Condition] = Condition

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance now."""
        return self.guidance is None and self.guidance_scale > 1

    @property
    def done(self) -> int:
        """Evaluations of the batch that are behind it."""
        return self._done

    def step(self) -> str:
        """How a message calls the step that is under way."""
        return f"step {self._done + 1} of {self.num_timesteps}"

    def begin(self, cond: Condition, null: Callable[[], Condition]) -> None:
        """The next batch, told ``cond``; ``null`` encodes what guidance calls nothing."""
        self.cond, self.null, self._encode_null, self._done = cond, None, null, 0

    def guide(self, predict: Predictor, *behind: Guidance | None) -> Predictor:
        """``predict`` guided, also by what is ``behind``, asked with the batch's condition and as
        the call is set then.
        """
        guide = self._classifier_free if self.guidance is None else self.guidance
        if self.guided or self.guidance is not None:
            self.null = self._encode_null()
        null = self.cond if self.null is None else self.null
        guided = Chain((guide, *(each for each in behind if each)))(predict, null)
        return lambda x_t, level, timestep, cond: guided(x_t, level, timestep, self.cond)

    def _classifier_free(self, predict: Predictor, null: Condition) -> Predictor:
        made: tuple[tuple[float, float], Condition, Predictor] | None = None  # until one is set

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            nonlocal made
            if not self.guided:
                return predict(x_t, level, timestep, cond)
            if self.null is None:  # a callback has begun to guide
                self.null = self._encode_null()
            now = self.guidance_scale, self.guidance_rescale
            if made is None or made[0] != now or made[1] is not self.null:
                made = now, self.null, ClassifierFree(*now)(predict, self.null)
            return made[2](x_t, level, timestep, cond)

        return guided

    def watched(self, denoiser: Denoiser, network: nn.Module) -> Denoiser:
        """``denoiser``, whose ``network`` is told of where its output is not finite."""

        def denoise(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            y = denoiser(x_t, timestep, cond)
            self.watch.see(y, f"the U-Net, at {self.step()}", network)
            return y

        return denoise

    def after(self, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        """A sampler's callback: what the pipeline's own makes of ``latent``.

        Raises:
            Interrupted: it asked to stop.
        """
        self.watch.see(latent, f"guidance or the sampler, at {self.step()}; {_TRY}")
        if self.callback is not None:
            latent = self._called(index, timestep, latent)
        self._done += 1
        if self.interrupt:
            raise Interrupted(latent)
        return latent

    def _called(self, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        offered = self._offered(latent)
        tensors = {name: offered[name] for name in self.inputs}
        returned = self.callback(self.pipeline, index, timestep, tensors) or {}
        # What was handed out may have been changed in place.
        for name, part in {"prompt_embeds": "tokens", **self.offers}.items():
            self._take(name, part, returned.get(name, offered[name]))
        handed = offered["latents"]
        found = returned.get("latents", handed)
        if found is latent:
            return latent
        new = found.to(latent)
        if new.shape == latent.shape:
            # What was left as it was handed out is not rounded.
            new = torch.where(new == latent.to(self.dtype).to(latent), latent, new)
        self.watch.see(new, f"the latents that the callback returned at {self.step()}")
        return new

    def _offered(self, latent: Tensor) -> dict[str, Tensor | None]:
        null = self.null if self.guided else None
        parts = {"prompt_embeds": "tokens", **self.offers}
        return {
            "latents": latent.to(self.dtype),
            "negative_prompt_embeds": None if null is None or null.tokens is None
            else null.tokens.clone(),
            **{name: _both(null, self.cond, part) for name, part in parts.items()},
        }  # fmt: skip

    def _take(self, name: str, part: str, told: Tensor | None) -> None:
        """As in stock ``prompt_embeds`` and the like are those of no text and of the text, or of
        the text alone, and ``negative_prompt_embeds`` are there to be read.
        """
        many = len(self.cond)
        if told is None:
            return
        if len(told) == 2 * many:
            null, told = told.chunk(2)
            if self.null is not None:
                self.null = _with(self.null, part, null)
        if len(told) != many:
            raise ValueError(
                f"the callback returned {name} of {len(told)} texts for {many} pictures"
            )
        self.cond = _with(self.cond, part, told)


def _part(cond: Condition, part: str) -> Tensor | None:
    return getattr(cond, part) if part in ("tokens", "pooled") else cond.extra.get(part)


def _with(cond: Condition, part: str, value: Tensor) -> Condition:
    if part == "tokens":
        return replace(cond, tokens=value)
    if part == "pooled":
        return replace(cond, pooled=value)
    return replace(cond, extra=cond.extra | {part: value})


def _both(null: Condition | None, cond: Condition, part: str) -> Tensor | None:
    """Of ``null``, where there is guidance, and of ``cond``, one behind the other."""
    own, other = _part(cond, part), None if null is None else _part(null, part)
    return own if own is None or other is None else torch.cat([other, own])


_CALLS: list[Call] = []  # gone through as a tuple: other threads end theirs meanwhile


class Ended(NamedTuple):
    """What a pipeline says of the last call of a thread."""

    guidance_scale: float
    guidance_rescale: float
    guided: bool
    num_timesteps: int
    interrupt: bool


_THREAD = threading.local()


def _ended() -> WeakKeyDictionary[Any, Ended]:
    """The last calls of this thread, by pipeline."""
    if not hasattr(_THREAD, "ended"):
        _THREAD.ended = WeakKeyDictionary()
    return _THREAD.ended


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """While ``call`` runs."""
    _CALLS.append(call)
    try:
        yield call
    finally:
        _CALLS.remove(call)
        _ended()[call.pipeline] = Ended(
            call.guidance_scale,
            call.guidance_rescale,
            call.guided,
            call.num_timesteps,
            call.interrupt,
        )


class SeenFromCallbacks:
    """The names on a pipeline that stand for the call that asks: of the thread that runs it.

    What another thread sets (``pipe._interrupt``) is set for all calls of the pipeline. Between
    calls the scheduler is the pipeline's own, and the other names are those of the last call of the
    thread that asks: no attributes before its first one, as in stock.
    """

    def _call(self) -> Call | None:
        here = threading.get_ident()
        mine = (c for c in reversed(tuple(_CALLS)) if c.pipeline is self and c.thread == here)
        return next(mine, None)

    def _asked(self, name: str) -> Any:
        call = self._call() or _ended().get(self)
        if call is None:
            raise AttributeError(f"{name} is that of a call, and there has been none")
        return getattr(call, name)

    def _set(self, name: str, value: Any) -> None:
        call = self._call()
        for each in [call] if call else [c for c in tuple(_CALLS) if c.pipeline is self]:
            setattr(each, name, value)

    @property
    def scheduler(self) -> Any:
        """The pipeline's, or in a callback the copy of it, or of the named sampler's, that runs."""
        call = self._call()
        running = call and call.scheduler
        return vars(self)["scheduler"] if running is None else running

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        vars(self)["scheduler"] = value

    @property
    def _interrupt(self) -> bool:
        return self._asked("interrupt")

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._set("interrupt", value)

    @property
    def interrupt(self) -> bool:
        """Whether the call stops after this step; ``_interrupt = True`` makes it."""
        return self._asked("interrupt")

    @property
    def _guidance_scale(self) -> float:
        return self._asked("guidance_scale")

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        call = self._call()
        if call and call.guidance is not None:
            raise ValueError("_guidance_scale: this call was passed a guidance of its own")
        self._set("guidance_scale", real("_guidance_scale", value))

    @property
    def guidance_scale(self) -> float:
        """That of the call, from here on as ``_guidance_scale`` was set."""
        return self._asked("guidance_scale")

    @property
    def _guidance_rescale(self) -> float:
        return self._asked("guidance_rescale")

    @_guidance_rescale.setter
    def _guidance_rescale(self, value: float) -> None:
        self._set("guidance_rescale", real("_guidance_rescale", value))

    @property
    def guidance_rescale(self) -> float:
        """That of the call."""
        return self._asked("guidance_rescale")

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step asks for two predictions."""
        return self._asked("guided")

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the call."""
        return self._asked("num_timesteps")

    @property
    def _num_timesteps(self) -> int:
        return self._asked("num_timesteps")
