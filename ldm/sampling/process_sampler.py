"""Samplers that walk down the levels of any process, variance preserving or not.

    x_1 = prior_std z,   x_s = step(x_t),   x_0 = x0_hat at the last level

The levels are those of ``NoiseProcess.grid``. Nothing is infinite on the way: neither sigma / alpha
at zero terminal SNR nor 1 / sigma, since the last step leaves no level to come to but the data.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.diffusion import Condition, Level, NoiseProcess, Prediction, Predictor, Target
from ldm.diffusion.target import System
from ldm.sampling.bridge import Callback, Generators
from ldm.sampling.parts import check_begin, check_part, nothing_between

_Pair: TypeAlias = tuple[Tensor, Tensor] | tuple[float, float]


class _Node(NamedTuple):
    """What is worked out of a time once.

    Args:
        level: float64.
        timestep: what the network is told.
        systems: by what a network speaks, and the dtype and number of axes of its output.
    """

    level: Level
    timestep: Tensor
    systems: dict[tuple[Target, torch.dtype, int], System]


class _Nodes(dict[float, _Node]):
    """By their times, for networks on ``device``; tensors of inference mode serve in it alone."""

    def __init__(self, process: NoiseProcess, device: torch.device, inference: bool) -> None:
        super().__init__()
        self.process, self.device = process, device
        self.factors: dict[tuple[float, float | None, torch.dtype], _Pair] = {}

    def __missing__(self, time: float) -> _Node:
        t = torch.tensor(time, dtype=torch.float64)
        level, timestep = self.process.level(t), self.process.timestep(t).float()
        found = _Node(level, timestep.to(self.device), {})
        if len(self) < _KEPT:  # a method that chooses its steps comes to others every time
            self[time] = found
        return found


_KEPT = 4096
_nodes = lru_cache(maxsize=32)(_Nodes)


@dataclass(frozen=True)
class Run:
    """What all steps of one call share; levels are worked out once for all calls."""

    process: NoiseProcess
    predict: Predictor
    cond: Condition
    generators: Generators | None
    callback: Callback | None
    nodes: _Nodes

    def level(self, t: Tensor) -> Level:
        """That of time ``t``, a scalar."""
        return self.nodes[float(t)].level

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told of ``t``, a scalar."""
        return self.nodes[float(t)].timestep

    def at(self, x: Tensor, t: Tensor) -> Prediction:
        """The prediction for ``x`` at time ``t``."""
        node = self.nodes[float(t)]
        return self.predict(x, node.level, node.timestep, self.cond)

    def ends(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """That prediction as x0 and eps, ``b ...``."""
        node = self.nodes[float(t)]
        found = self.predict(x, node.level, node.timestep, self.cond)
        y = found.y
        if found.level is not node.level or y.device != self.nodes.device:
            return found.ends
        kind = found.target, y.dtype, y.ndim
        system = node.systems.get(kind)
        if system is None:
            system = node.systems[kind] = System.of(found.target, found.level, y)
        return system.ends(found.x_t, y)

    def factors(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> _Pair:
        """Alpha and sigma of time ``t``, or their changes from there to ``s``, for tensors like
        ``x`` to be multiplied by.
        """
        key = float(t), None if s is None else float(s), x.dtype
        found = self.nodes.factors.get(key)
        if found is None:
            alpha, sigma, *_ = self.level(t)
            if s is not None:
                alpha, sigma = self.level(s).alpha - alpha, self.level(s).sigma - sigma
            # The same product as by a number of Python's, in half of the time.
            single = x.dtype == torch.float32
            found = (alpha.float(), sigma.float()) if single else (float(alpha), float(sigma))
            if len(self.nodes.factors) < _KEPT:
                self.nodes.factors[key] = found
        return found

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise like ``x``."""
        many = isinstance(self.generators, Sequence)
        draws = list(self.generators) if many else self.generators  # type: ignore[arg-type]
        return randn_tensor(tuple(x.shape), draws, x.device, x.dtype)  # type: ignore[arg-type]

    def seen(self, index: int, x: Tensor, t: Tensor) -> Tensor:
        """``x``, or what the callback replaces it by."""
        replaced = self.callback and self.callback(index, self.timestep(t), x)
        return x if replaced is None else replaced


@dataclass(frozen=True)
class ProcessSampler(ABC):
    """A sampler on a noise process.

    Args:
        process: whose levels are walked.
        target: what the network speaks; refused where it does not determine x0.
    """

    process: NoiseProcess
    target: Target

    order: ClassVar[int] = 1
    """Of convergence in the number of steps, as tests/laws measures it."""
    stochastic: ClassVar[bool] = False
    """Draws noise, so that it runs from noise to data alone."""

    def __post_init__(self) -> None:
        self.process.refuse(self.target)

    def seen_at(self, tokens: int) -> ProcessSampler:
        """The sampler for pictures of so many tokens."""
        return replace(self, process=self.process.seen_at(tokens))

    @abstractmethod
    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``x`` at time ``t`` brought to time ``s``."""

    def times(self, steps: int, start: float, stop: float | None) -> Tensor:
        """The times of ``steps`` steps, the last of which is the jump to x0 if ``stop`` is None,
        and else ends at the last of them.
        """
        count = steps if stop is None else steps + 1
        return self.process.grid(count, start, 0.0 if stop is None else stop)

    def walk(self, run: Run, x: Tensor, times: Tensor) -> Tensor:
        """``x`` at the first time brought to the last."""
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            x = run.seen(index, self.step(run, x, t, s), t)
        return x

    def evaluations(
        self,
        steps: int,
        *,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
    ) -> int:
        """Times that the callback is called: once a step, whatever a step costs."""
        return len(self._part(steps, denoising_start, denoising_end, begin))

    def noised(self, x0: Tensor, eps: Tensor, *, steps: int, begin: int) -> Tensor:
        """``x0`` with noise ``eps`` where step ``begin`` of so many sets out: its ``x``."""
        if begin == steps:
            return x0
        level = self.process.level(self.process.grid(steps)[begin]).like(x0)
        x_t = level.alpha * x0 + level.sigma * eps
        return x_t / self.process.prior_std() if begin == 0 else x_t

    def _part(
        self, steps: int, denoising_start: float, denoising_end: float, first: int = 0
    ) -> range:
        """Which of the ``steps`` steps from noise to data are taken: step i sets out at the share
        i / (steps - 1) of the clock, and as in stock one at ``denoising_end`` is taken. Or those
        from the step ``first`` on.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        check_part(denoising_start, denoising_end)
        check_begin(first, steps, (denoising_start, denoising_end))
        if first:
            return range(first, steps)
        # 1e-9 is for rounding: 0.29 of 100 are 28.999999999999996.
        begin, end = (
            int((share + 1e-9) * (steps - 1)) + 1 for share in (denoising_start, denoising_end)
        )
        part = range(begin if denoising_start > 0 else 0, end)
        if not part:
            raise nothing_between(steps, denoising_start, denoising_end)
        return part

    def __call__(
        self,
        predict: Predictor,
        x: Tensor,
        cond: Condition,
        *,
        steps: int,
        start: float | None = None,
        stop: float | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
        generators: Generators | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples ``b ...``, in the dtype of ``x``.

        Args:
            predict: called with a scalar level and a scalar timestep.
            x: standard normal noise ``b ...``; if ``start``, ``denoising_start`` or ``begin`` is
                given, x_t there.
            cond: condition of the batch.
            steps: steps, the last of which is the jump to x0_hat if ``stop`` is None.
            start: where on the clock ``process.time`` the run begins: 1 is noise, 0 the first node.
            stop: where it ends, with x_t there; None: with x0. Above ``start`` data become noise.
            denoising_start: in place of ``start``, as in stock: of the ``steps`` steps from noise
                to data those are left out that set out before this share of the clock, in [0, 1).
            denoising_end: the same, those after it, in (0, 1]; below 1 the run ends with x_t where
                one with that ``denoising_start`` begins.
            begin: in place of the shares the number of the first step that is taken: ``x`` is then
                what ``noised`` makes, and with ``steps`` the sample.
            generators: of the noise of stochastic samplers: one for the batch, or one per sample.
            callback: called after every step.

        Raises:
            ValueError: ``steps``, ``start`` or ``stop`` are out of range, so are the shares, or
                they are given beside ``start`` or ``stop``.
        """
        part = self._part(steps, denoising_start, denoising_end, begin)
        shares = denoising_start, denoising_end
        if (begin or shares != (0, 1)) and (start, stop) != (None, None):
            raise ValueError("pass either start and stop or denoising_start and denoising_end")
        if not part:
            return x
        first, last = 1.0 if start is None else start, 0.0 if stop is None else stop
        if not (0 <= first <= 1 and 0 <= last <= 1):
            raise ValueError(f"start and stop must lie in [0, 1], not {first} and {last}")
        if self.stochastic and first < last:
            raise ValueError(
                f"{type(self).__name__} runs from noise to data: start ({first}) must not be"
                f" below stop ({last})"
            )

        def checked(x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            found = predict(x, level, timestep, cond)
            if found.target != self.target:
                self.process.refuse(found.target)
            return found

        nodes = _nodes(self.process, x.device, torch.is_inference_mode_enabled())
        run = Run(self.process, checked, cond, generators, callback, nodes)
        times = self.times(steps, first, stop)
        times = times[part.start : part.stop + 1]
        if start is None and denoising_start == 0 and begin == 0:
            x = x * self.process.prior_std()
        x = self.walk(run, x, times)
        if stop is not None or part.stop < steps:
            return x
        x0 = run.at(x, times[-1]).x0.to(x.dtype)
        return run.seen(len(part) - 1, x0, times[-1])
