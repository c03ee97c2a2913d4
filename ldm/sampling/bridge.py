"""Any diffusers scheduler as a sampler: x <- step(y(x_t, level), x), levels being its own
(``ldm.sampling.levels``).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ldm.diffusion import (
    Condition,
    NoiseProcess,
    Predictor,
    RectifiedFlow,
    Target,
    process_of,
    scheduler_config,
    target_of,
)
from ldm.diffusion.level import typed
from ldm.diffusion.shift import SizeShift
from ldm.sampling.built import built
from ldm.sampling.levels import FLOW, arguments, level_of
from ldm.sampling.parts import (
    FROM_THE_FIRST,
    begun,
    check_begin,
    check_part,
    noised,
    nothing_between,
)
from ldm.sampling.recorded import steps_of
from ldm.sampling.steps import Steps, options

log = logging.getLogger(__name__)

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
Callback: TypeAlias = Callable[[int, Tensor, Tensor], Tensor | None]
"""(number of the evaluation from 0, timestep, latent after the step) -> a latent to go on with
instead, or None.
"""


@dataclass(frozen=True)
class SchedulerSampler:
    """A scheduler, of which every call runs a copy.

    Schedulers are stateful, so only this lets one sampler serve many threads. The noise process is
    read from the config and the scheduler's own table is checked against it, because a scheduler
    drops a config key that it does not know without a word. With zero terminal SNR the timesteps of
    a number of steps are spaced "trailing", whatever the config says: other spacings skip the only
    level that pure noise belongs to (Lin et al. 2024, section 3.3).

    Args:
        scheduler: class of a diffusers scheduler.
        config: its ``scheduler_config.json``, or ``scheduler.config``.
        eta: of DDIM (Song et al. 2021a, eq. 16): 0 deterministic, 1 ancestral; other schedulers
            ignore it.
        given: the scheduler itself, with all that its config does not say; None: built here.
        tokens: of the pictures, where the shift of a flow goes by their size (``seen_at``).

    Raises:
        ValueError: the scheduler does not run the process that its config states (the message names
            the key), or the scheduler speaks eps and the process has zero terminal SNR, or a
            function was put in place of a method of ``given``, which a copy would not run.

    """

    scheduler: type[Any]
    config: Mapping[str, Any]
    eta: float = 0.0
    given: Any = field(default=None, compare=False)
    tokens: int | None = None
    process: NoiseProcess = field(init=False)
    target: Target = field(init=False)
    """What the scheduler's ``step`` expects; the network may speak another target."""
    _original: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = self.scheduler.__name__
        if not issubclass(self.scheduler, FLOW):
            for key in ("use_flow_sigmas", "use_dynamic_shifting"):
                if self.config.get(key):
                    raise ValueError(
                        f"{name}: {key} is not supported, the process is variance preserving"
                    )
        object.__setattr__(self, "process", process_of(self.config))
        object.__setattr__(self, "target", target_of(self.config))
        own = built(self.scheduler, self.config) if self.given is None else self.given
        object.__setattr__(self, "_original", own)
        if self.given is not None:
            _refuse_replaced(self.given)
        self._check(self._original)
        self.process.refuse(self.target)

    @property
    def _by_size(self) -> SizeShift | None:
        """The shift of the process, if it goes by the size of a picture."""
        shift = self.process.shift if isinstance(self.process, RectifiedFlow) else None
        return shift if isinstance(shift, SizeShift) else None

    def seen_at(self, tokens: int) -> SchedulerSampler:
        """The sampler for pictures of so many tokens; itself, where it is the same for all."""
        return replace(self, tokens=tokens) if self._by_size else self

    def _check(self, scheduler: Any) -> None:
        name = self.scheduler.__name__
        if isinstance(scheduler, FLOW):  # all of whose levels are its own
            if self._by_size and not _takes(scheduler, "mu"):
                raise ValueError(f"{name} knows no shift by the size of a picture: use flow-euler")
            return
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{name} has no alphas_cumprod: only variance-preserving schedulers are supported"
            )
        mine = self.process.table.alpha**2
        theirs: Tensor = scheduler.alphas_cumprod.double().cpu()
        sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
        # Infinite, or already divided by infinity, if told of zero terminal SNR in betas alone.
        finite = sigmas is None or bool(sigmas.isfinite().all())
        same = finite and len(mine) == len(theirs)
        # Their table is float32, and some end on 2^-24 = 6e-8, not 0, at zero terminal SNR.
        if same and bool(((theirs - mine).abs() <= (2e-6 * mine).clamp(min=1e-7)).all()):
            return
        known = arguments(self.scheduler.__init__)
        stated = scheduler_config(self.process, self.target)
        words = [key for key in stated if not key.startswith("_")]
        dropped = [key for key in words if key in self.config and key not in known]
        blame = " and ".join(dropped) or "one of " + ", ".join(words)
        blame = blame if finite else "rescale_betas_zero_snr"
        if same and self.given is not None and not dropped:
            raise ValueError(
                f"alphas_cumprod of this {name} is not what its config states, from which the"
                " levels of the network are read: state the table there, as trained_betas"
            )
        raise ValueError(
            f"{name} does not honour {blame} of the scheduler config: its noise levels are not"
            " those of this model; use another scheduler (DDIM, DDPM, DPMSolverMultistep, Euler,"
            " EulerAncestral and UniPC know every key)"
        )

    def takes(self, key: str, steps: int) -> bool:
        """Whether there may be so many ``timesteps``, or ``sigmas``, of one's own."""
        return _takes(self._original, key) and 1 <= steps <= self.process.num_train_timesteps

    def start(
        self,
        steps: int,
        device: torch.device | str = "cpu",
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Any:
        """A copy of the scheduler, set to ``steps``, or to ``timesteps`` or ``sigmas`` of one's own
        where its ``set_timesteps`` takes them.

        Raises:
            ValueError: its timesteps would leave the table, or it takes no such list.
        """
        most, name = self.process.num_train_timesteps, self.scheduler.__name__
        own = {"timesteps": timesteps, "sigmas": sigmas}
        own = {key: value for key, value in own.items() if value is not None}
        if not own and not 1 <= steps <= most:
            raise ValueError(
                f"steps must lie in 1..{most} (the length of the noise table), not {steps}"
            )
        scheduler = copy.deepcopy(self._original)
        spacing = None if own else scheduler.config.get("timestep_spacing")
        if float(self.process.table.alpha[-1]) == 0 and spacing not in (None, "trailing"):
            scheduler.register_to_config(timestep_spacing="trailing")
            if self.given is not None:
                _warn_of_spacing(name, spacing)
        for key in own:
            if not _takes(scheduler, key):
                raise ValueError(f"{name} takes no {key} of one's own, only a number of steps")
        if len(own) > 1:
            raise ValueError("pass either timesteps or sigmas, not both")
        shift = self._by_size
        set_to: dict[str, Any] = {**own} or {"num_inference_steps": steps}
        if shift:
            set_to["mu"] = shift.mu(self.tokens or shift.start)
        scheduler.set_timesteps(**set_to, device=device)
        if hasattr(scheduler, "set_begin_index"):
            # Where Karras or Lu spacing rounds the first two timesteps to one, the search by
            # timestep would begin at the second sigma and run off the end of the table; everywhere
            # else it begins at 0 anyway.
            scheduler.set_begin_index(0)
        if own:
            least, greatest = scheduler.timesteps.min().item(), scheduler.timesteps.max().item()
            last = most if isinstance(scheduler, FLOW) else most - 1
            if least < 0 or greatest > last:
                raise ValueError(
                    f"timesteps must lie in 0..{last}, not between {least:g} and {greatest:g}"
                )
        elif bool((scheduler.timesteps < 0).any()):
            # np.arange(1000, 0, -1000 / 61) has 62 entries: the last is about 1e-13 and becomes
            # timestep -1, which Python reads as the *noisiest* level.
            raise ValueError(
                f"{name}: trailing spacing rounds a timestep below 0 at {steps}"
                f" steps; use another number (those that divide {most} are safe)"
            )
        return scheduler

    def part(
        self,
        scheduler: Any,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
    ) -> Tensor:
        """The timesteps on a part of the way, at the first of which ``scheduler``, which ``start``
        has set, is told to begin.

        With N timesteps of training it is those below N - ``denoising_start`` N and not below N -
        ``denoising_end`` N (both rounded), as in stock ``StableDiffusionXLImg2ImgPipeline`` and
        ``StableDiffusionXLPipeline``. A scheduler that asks twice a step begins with a step's first
        evaluation, also as in stock: with that of the step whose second one lies below. ``begin``
        is the number of the first step in their place.

        Raises:
            ValueError: the shares are none, nothing is left to do, or the scheduler cannot begin or
                end midway.
        """
        check_part(denoising_start, denoising_end)
        timesteps: Tensor = scheduler.timesteps
        check_begin(begin, -(-len(timesteps) // scheduler.order), (denoising_start, denoising_end))
        if begin:
            return begun(scheduler, begin)
        if denoising_start == 0 and denoising_end == 1:
            return timesteps
        if isinstance(scheduler, FROM_THE_FIRST):
            raise ValueError(
                f"{type(scheduler).__name__} knows no denoising_start or denoising_end: its steps"
                " need what was said at those before; use another scheduler (DDIM,"
                " DPMSolverMultistep, Euler, Heun and UniPC can begin and end anywhere)"
            )
        most, total = self.process.num_train_timesteps, len(timesteps)
        nothing = nothing_between(total, denoising_start, denoising_end)
        if denoising_start > 0:
            left = int((timesteps < round(most - denoising_start * most)).sum())
            if left == 0:
                raise nothing
            # All timesteps but the first are there twice: an even number would begin in a step.
            left += scheduler.order == 2 and left % 2 == 0
            timesteps = timesteps[total - left :]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(total - left)
        if denoising_end < 1:
            timesteps = timesteps[: int((timesteps >= round(most - denoising_end * most)).sum())]
        if len(timesteps) == 0:
            raise nothing
        return timesteps

    def evaluations(
        self,
        steps: int,
        *,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
    ) -> int:
        """Times that the network is called (and the callback after it): more than ``steps`` for
        Heun or PNDM.
        """
        return len(self.part(self.start(steps), denoising_start, denoising_end, begin))

    def noised(self, x0: Tensor, eps: Tensor, *, steps: int, begin: int) -> Tensor:
        """``x0`` with noise ``eps`` where step ``begin`` of so many sets out: its ``x``."""
        return noised(self.start(steps, x0.device), x0, eps, begin)

    level = staticmethod(level_of)

    def __call__(
        self,
        predict: Predictor,
        x: Tensor,
        cond: Condition,
        *,
        steps: int,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
        generators: Generators | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples, ``b ...``, in the dtype of ``x`` (keep it float32: that is the dtype of the
        scheduler's maths).

        Args:
            predict: called with a scalar level and the timestep exactly as the scheduler gives it,
                a scalar.
            x: standard normal noise ``b ...`` (the convention of ``latents`` in diffusers); with a
                ``denoising_start`` x_t there, in the scheduler's coordinate: what a run with that
                ``denoising_end`` gave.
            cond: condition of the batch.
            steps: steps of the scheduler from noise to data; see ``evaluations``.
            denoising_start: share of the timesteps of training that is gone already, in [0, 1).
            denoising_end: share of them that is gone at the end, in (0, 1]; below 1 the samples are
                x_t there, in the scheduler's coordinate.
            begin: in their place the number of the first step that is taken: ``x`` is then what
                ``noised`` makes, and with ``steps`` the sample.
            generators: of the noise of stochastic schedulers: one for the batch, or one per sample.
            callback: called after every evaluation.

        """
        return self.run(
            self.start(steps, x.device),
            predict,
            x,
            cond,
            generators,
            callback,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            begin=begin,
        )

    def run(
        self,
        scheduler: Any,
        predict: Predictor,
        x: Tensor,
        cond: Condition,
        generators: Generators | None = None,
        callback: Callback | None = None,
        *,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
        itself: bool = False,
    ) -> Tensor:
        """What a call does, with a ``scheduler`` that ``start`` has set; it runs once. Unless it is
        seen meanwhile, and so must take its steps ``itself``, recorded ones may be taken.
        """
        timesteps = self.part(scheduler, denoising_start, denoising_end, begin)
        if denoising_start == 0 and begin == 0 and not isinstance(scheduler, FLOW):
            x = x * scheduler.init_noise_sigma
        learned = getattr(scheduler.config, "variance_type", None) == "learned_range"
        refused: Target | None = self.target
        way = scheduler, timesteps, options(scheduler, self.eta, generators)
        steps = Steps(*way) if itself else steps_of(*way, x)
        for index, timestep in enumerate(steps.timesteps):
            x_t, level = steps.seen(index, x)
            prediction = predict(x_t, level, timestep, cond)
            if prediction.target != refused:
                refused = prediction.target
                self.process.refuse(refused)
            y = typed(prediction.as_(self.target), x.dtype)
            if learned and prediction.variance is not None:
                y = torch.cat([y, prediction.variance.to(x.dtype)], 1)
            x = steps.step(index, y, x)
            if callback is not None:
                replaced = callback(index, timestep, x)
                x = x if replaced is None else replaced
        return x


def _takes(scheduler: Any, key: str) -> bool:
    """Whether its ``set_timesteps`` has an argument ``key``."""
    return key in arguments(scheduler.set_timesteps)


def _refuse_replaced(scheduler: Any) -> None:
    """``ValueError`` for a function in place of a method: where it reaches for the scheduler that
    it was made for, a copy's state is not what it sees. A method bound to the scheduler goes along.
    """
    for name, value in vars(scheduler).items():
        if not callable(getattr(type(scheduler), name, None)):
            continue
        if not (isinstance(value, MethodType) and value.__self__ is scheduler):
            kind = type(scheduler).__name__
            raise ValueError(
                f"{name} of this {kind} was replaced by a function: every call draws with a copy of"
                f" the scheduler, which such a function does not know; write a subclass of {kind}"
                f" with a {name} of its own, or bind it (types.MethodType(function, scheduler))"
            )


@cache  # once
def _warn_of_spacing(name: str, spacing: str) -> None:
    log.warning(
        "%s: timestep_spacing %r never asks at the last timestep, the only level of zero terminal"
        ' SNR that pure noise belongs to: "trailing" is used instead, and stock diffusers draws'
        " other pictures; set timestep_spacing to trailing to have the same from both",
        name,
        spacing,
    )
