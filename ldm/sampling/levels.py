"""The level of a network's input, whatever coordinate a scheduler keeps x in.

DDPM, DDIM, PNDM, DPM-Solver++ and UniPC keep x_t = alpha x0 + sigma eps; Euler, Heun, LMS and KDPM2
keep x = x0 + r eps with r = sigma / alpha (Karras et al. 2022, table 1), and ``scale_model_input``
divides by sqrt(1 + r^2). The network sees the first in both cases, at

    alpha = 1 / sqrt(1 + r^2),   sigma = r / sqrt(1 + r^2).

Flow matching keeps x_t = (1 - s) x0 + s eps, which the network sees as it is.
"""

from __future__ import annotations

from typing import Any

import torch
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
    sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        alpha_bar: Tensor = scheduler.alphas_cumprod[timestep.long().cpu()].double()
        return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    if scheduler.step_index is None:
        # What step() would do first, a moment earlier.
        scheduler._init_step_index(timestep)  # pyright: ignore[reportPrivateUsage]
    if isinstance(scheduler, FLOW):
        sigma = sigmas[scheduler.step_index].double()
        one = torch.ones_like(sigma)
        return Level(1 - sigma, sigma, -one, one)
    if not getattr(scheduler, "state_in_first_order", True):
        sigmas = getattr(scheduler, "sigmas_interpol", sigmas)
    assert sigmas is not None
    ratio = sigmas[scheduler.step_index].double()
    scale = 1 / (1 + ratio**2).sqrt()
    return Level(scale, ratio * scale)
