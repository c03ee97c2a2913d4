"""The level of a network's input, whatever coordinate a scheduler keeps x in.

DDPM, DDIM, PNDM, DPM-Solver++ and UniPC keep x_t = alpha x0 + sigma eps; Euler, Heun, LMS and KDPM2
keep x = x0 + r eps with r = sigma / alpha (Karras et al. 2022, table 1), and ``scale_model_input``
divides by sqrt(1 + r^2). The network sees the first in both cases, at

    alpha = 1 / sqrt(1 + r^2),   sigma = r / sqrt(1 + r^2).

Flow matching keeps x_t = (1 - s) x0 + s eps, which the network sees as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from ldm.diffusion import Level

FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
"""Schedulers of rectified flows: they have neither ``init_noise_sigma`` nor ``scale_model_input``,
both of which would be 1.
"""


def level_of(scheduler: Any, timestep: Tensor) -> Level:
    """Level, scalars in float64, of the network's input at ``timestep`` of a scheduler that is
    under way.

    The level is the scheduler's and never looked up by timestep where the scheduler has sigmas of
    its own: Karras spacing rounds timesteps, by which sigma would be up to 4.5 % off, and
    FlowMatchEulerDiscreteScheduler shifts the ends of its way twice.
    """
    return Levels(scheduler, timestep.reshape(1))(0, timestep)


class Levels:
    """``level_of`` at every step of a scheduler, which is set: worked out at once, so that its loop
    looks up what is there already and waits for no device.

    Args:
        scheduler: set, and from then on under way.
        timesteps: those that it goes through.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor) -> None:
        self._scheduler = scheduler
        sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
        self._by_timestep = sigmas is None
        if sigmas is None:
            alpha_bar: Tensor = scheduler.alphas_cumprod[timesteps.long().cpu()].double()
            self._first = self._second = _apart(Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
            return
        of = _of_flow if isinstance(scheduler, FLOW) else _of_ratio
        self._first = self._second = _apart(of(sigmas.double()))
        between: Tensor | None = getattr(scheduler, "sigmas_interpol", None)
        if between is not None:
            self._second = _apart(of(between.double()))

    def __call__(self, index: int, timestep: Tensor) -> Level:
        """The level of step ``index``, which is the next, at ``timestep``."""
        if self._by_timestep:
            return self._first[index]
        scheduler = self._scheduler
        if scheduler.step_index is None:
            # What step() would do first, a moment earlier.
            scheduler._init_step_index(timestep)  # pyright: ignore[reportPrivateUsage]
        levels = self._first if getattr(scheduler, "state_in_first_order", True) else self._second
        return levels[cast(int, scheduler.step_index)]


def arguments(method: Callable[..., Any]) -> frozenset[str]:
    """Names of what ``method`` takes, beside itself; asked once, since to ask takes long."""
    return _arguments(getattr(method, "__func__", method))


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def told(scheduler: Any, timesteps: Tensor) -> Sequence[Any]:
    """What its ``step`` is told of each of ``timesteps``: that of DDIM looks its table up by it,
    and must not wait for a device to say where.
    """
    return timesteps.tolist() if type(scheduler).step is DDIMScheduler.step else timesteps.unbind()


def _of_flow(sigma: Tensor) -> Level:
    one = torch.ones_like(sigma)
    return Level(1 - sigma, sigma, -one, one)


def _of_ratio(ratio: Tensor) -> Level:
    scale = 1 / (1 + ratio**2).sqrt()
    return Level(scale, ratio * scale)


def _apart(levels: Level) -> list[Level]:
    """One by one."""
    parts = (None if part is None else part.unbind() for part in levels)
    alpha, sigma, *rates = parts
    assert alpha is not None and sigma is not None
    d_alpha, d_sigma = (rate or [None] * len(alpha) for rate in rates)
    return [Level(*each) for each in zip(alpha, sigma, d_alpha, d_sigma, strict=True)]
