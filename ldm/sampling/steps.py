"""A scheduler that is under way: what the network is asked at each step, and the step itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion import Level
from ldm.sampling.levels import FLOW, Levels, arguments, told


def options(
    scheduler: Any, eta: float, generators: torch.Generator | Sequence[torch.Generator] | None
) -> dict[str, Any]:
    """What ``step`` of a ``scheduler`` is told beside tensors, as far as it takes it."""
    accepted = arguments(scheduler.step)
    found: dict[str, Any] = {"return_dict": False}
    if "eta" in accepted:
        found["eta"] = eta
    if "generator" in accepted:
        many = isinstance(generators, Sequence)
        found["generator"] = list(generators) if many else generators
    return found


class Steps:
    """The steps of a ``scheduler`` that is set, taken by itself, each once and in their order.

    Args:
        scheduler: about to take the first.
        timesteps: those that it goes through.
        options: of its ``step``.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, options: Mapping[str, Any]) -> None:
        self.timesteps = timesteps.unbind()
        self._scheduler, self._options = scheduler, options
        self._level, self._numbers = Levels(scheduler, timesteps), told(scheduler, timesteps)
        self._scales = not isinstance(scheduler, FLOW)

    def seen(self, index: int, x: Tensor) -> tuple[Tensor, Level]:
        """What the network sees of ``x``, ``b ...``, at evaluation ``index``, and its level."""
        timestep = self.timesteps[index]
        x_t = self._scheduler.scale_model_input(x, timestep) if self._scales else x
        return x_t, self._level(index, timestep)

    def step(self, index: int, y: Tensor, x: Tensor) -> Tensor:
        """``x`` after it, ``y`` being what the network said in the scheduler's terms."""
        return self._scheduler.step(y, self._numbers[index], x, **self._options)[0]
