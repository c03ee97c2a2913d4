"""Which steps of the way from noise to data are taken, and where one sets out midway."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from ldm.sampling.levels import FLOW, level_of

FROM_THE_FIRST = (PNDMScheduler, LMSDiscreteScheduler)
"""Their steps weigh what the network said at the steps before, which they count from the first."""


def check_part(denoising_start: float, denoising_end: float) -> None:
    """``ValueError`` unless 0 <= ``denoising_start`` < ``denoising_end`` <= 1."""
    if not 0 <= denoising_start < 1:
        raise ValueError(f"denoising_start must lie in [0, 1), not {denoising_start}")
    if not 0 < denoising_end <= 1:
        raise ValueError(f"denoising_end must lie in (0, 1], not {denoising_end}")
    if denoising_start >= denoising_end:
        raise ValueError(
            f"denoising_start ({denoising_start}) must be less than denoising_end ({denoising_end})"
        )


def nothing_between(steps: int, denoising_start: float, denoising_end: float) -> ValueError:
    """The error of a part of the way on which the network is never asked."""
    return ValueError(
        f"nothing to do between denoising_start {denoising_start} and denoising_end"
        f" {denoising_end}: none of the {steps} evaluations lies there; use more steps"
    )


def check_begin(begin: int, steps: int, shares: tuple[float, float]) -> None:
    """``ValueError`` unless ``begin`` is the number of one of so many steps, or that behind the
    last, and is given alone.
    """
    if not 0 <= begin <= steps:
        raise ValueError(f"begin must lie in 0..{steps}, the number of steps, not {begin}")
    if begin and shares != (0, 1):
        raise ValueError("pass either begin or denoising_start and denoising_end")


def begun(scheduler: Any, begin: int) -> Tensor:
    """The timesteps of a scheduler from its step ``begin`` on, at the first of which it is told to
    begin; none behind the last.

    A scheduler that asks twice a step has two timesteps a step. PNDM asks twice in its first step
    alone: that is the first of those that are taken, which stock forgets, so that from there on its
    latents are those of the step before.

    Raises:
        ValueError: its steps weigh what was said at those before.
    """
    timesteps: Tensor = scheduler.timesteps
    if begin == 0:
        return timesteps
    if isinstance(scheduler, PNDMScheduler) and scheduler.config["skip_prk_steps"]:
        once = torch.cat([timesteps[:1], timesteps[2:]])[begin:]
        return torch.cat([once[:2], once[1:]])
    if isinstance(scheduler, FROM_THE_FIRST):
        raise ValueError(
            f"{type(scheduler).__name__} cannot begin midway: its steps need what was said at those"
            " before; use another scheduler (DDIM, DPMSolverMultistep, Euler, Heun and UniPC can)"
        )
    first = min(begin * scheduler.order, len(timesteps))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def noised(scheduler: Any, x0: Tensor, eps: Tensor, begin: int) -> Tensor:
    """``x0`` with the noise ``eps``, ``b ...``, where the step ``begin`` of ``scheduler`` sets out,
    in the coordinate that the scheduler keeps; behind the last step ``x0``. At the first it is in
    units of noise, as that is where a whole run sets out.
    """
    timesteps = begun(scheduler, begin)
    if len(timesteps) == 0:
        return x0
    level = level_of(scheduler, timesteps[0]).like(x0)
    x_t = level.alpha * x0 + level.sigma * eps
    if isinstance(scheduler, FLOW):
        return x_t
    x = x_t / scheduler.scale_model_input(torch.ones_like(x0[:1]), timesteps[0])
    return x / scheduler.init_noise_sigma if begin == 0 else x
