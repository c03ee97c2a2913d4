"""The named samplers: a scheduler's class with every setting that changes a picture pinned.

ddim: Song et al. 2021a, eq. 12.   ddpm: Ho et al. 2020, eqs. 6 and 7.   dpm++: Lu et al. 2022b,
algorithm 2 (2M). euler, euler-a: Karras et al. 2022, algorithm 1 without its second-order step;
euler-a with the noise split of ancestral sampling.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from ldm.diffusion import NoiseProcess, VariancePreserving, target_of
from ldm.sampling.bridge import SchedulerSampler


class _DDIM(DDIMScheduler):
    """DDIM whose every step ends at the level at which the next one begins.

    The stock ``step`` goes down by ``N // steps`` whatever the next timestep is. With trailing
    spacing and a number of steps that does not divide N = 1000 the two differ: the mean of a
    Gaussian comes out wrong (by 0.6 % of its standard deviation at 30 steps).
    """

    def step(  # type: ignore[override]  # the arguments the bridge uses
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        below = self.timesteps[self.timesteps < timestep]
        gap = int(timestep) - (int(below[0]) if len(below) else -1)
        # Its only use in step() is N // num_inference_steps, which this makes the gap, exactly.
        self.num_inference_steps = Fraction(self.config["num_train_timesteps"], gap)
        return super().step(
            model_output, timestep, sample, eta, generator=generator, return_dict=return_dict
        )


@dataclass(frozen=True)
class Named:
    """A row of the table.

    Args:
        scheduler: the class that steps.
        order: of convergence in the number of steps, as tests/laws/test_gaussian.py measures it.
        pins: settings, over the defaults of the class; the noise process is added by ``sampler``.
        stochastic: draws noise at every step.

    """

    scheduler: type[Any]
    order: int
    pins: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stochastic: bool = False


# Trailing spacing: the first step is at the last timestep, the one level that pure noise belongs
# to, so the mean of a picture (its brightness) survives few steps: on a Gaussian N(0.7, 1) from
# pure noise the mean is off by -0.04 at 5 steps, with "leading" by -0.10 (Lin et al. 2024, section
# 3.3). "linspace" is as good there and spends one step on timestep 0. All end on sigma = 0: the
# last step returns x0_hat and leaves no noise in the latent.
#
# dpm++ is the exception. Evenly spaced timesteps leave it a last step from sigma / alpha = 0.2 (at
# 20 steps) to 0, which only first order can take: the error of a standard deviation of 1, 0.3, 0.1
# is then -0.020, -0.059, -0.059. Even steps in log-SNR, on which the order of the method is proven
# (Lu et al. 2022a, section 3.4), make it +0.006, +0.001, -0.004, the rounding of timesteps
# included. They win from 8 steps on, with zero terminal SNR too. Karras spacing is worse on most
# of these and is off.
SAMPLERS: dict[str, Named] = {
    "ddim": Named(
        _DDIM,
        order=1,
        pins={"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True},
    ),
    "ddpm": Named(
        DDPMScheduler,
        order=1,
        # fixed_small is the variance of q(x_s | x_t, x0); fixed_large would leave noise in the last
        # step.
        pins={
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "variance_type": "fixed_small",
        },
        stochastic=True,
    ),
    "dpm++": Named(
        DPMSolverMultistepScheduler,
        order=2,
        pins={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "use_lu_lambdas": True,
            "use_karras_sigmas": False,
            "final_sigmas_type": "zero",
            "timestep_spacing": "trailing",
        },
    ),
    "euler": Named(
        EulerDiscreteScheduler,
        order=1,
        pins={
            "timestep_spacing": "trailing",
            "use_karras_sigmas": False,
            "final_sigmas_type": "zero",
        },
    ),
    "euler-a": Named(
        EulerAncestralDiscreteScheduler,
        order=1,
        pins={"timestep_spacing": "trailing"},
        stochastic=True,
    ),
}


def sampler(name: str, config: Mapping[str, Any], eta: float = 0.0) -> SchedulerSampler:
    """The named sampler on the noise process and prediction type of a ``scheduler_config.json``.

    Everything else in ``config`` (spacing, offsets, clipping, sigmas) is replaced by the table's
    pins. ``ValueError`` lists the names if ``name`` is none of them.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown sampler {name!r}: did you mean {near!r}? There are {', '.join(SAMPLERS)}"
        )
    process, row = NoiseProcess.from_scheduler(config), SAMPLERS[name]
    if not isinstance(process, VariancePreserving):
        raise ValueError(
            f"sampler {name!r} runs variance preserving processes, not {process.kind!r}"
        )
    pins = dict(row.pins)
    if name == "ddpm" and config.get("variance_type") == "learned_range":
        pins["variance_type"] = "learned_range"
    stated = process.scheduler_config(target_of(config))
    return SchedulerSampler(row.scheduler, {**stated, **pins}, eta)
