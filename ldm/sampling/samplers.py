"""The named samplers: a scheduler's class with every setting that changes a picture pinned, and
those of this library, which run any process.

ddim: Song et al. 2021a, eq. 12.   ddpm: Ho et al. 2020, eqs. 6 and 7.   dpm++: Lu et al. 2022b,
algorithm 2 (2M). heun: Karras et al. 2022, algorithm 1; euler: without its second-order step;
euler-a: with the noise split of ancestral sampling. dpm2: Lu et al. 2022a, algorithm 1. unipc: Zhao
et al. 2023. pndm: Liu et al. 2022, its multistep part. flow-euler, flow-heun: the same
along a rectified flow (Liu et al. 2023). lcm: Luo et al. 2023, algorithm 3; tcd: Zheng et al. 2024,
algorithm 4. The others: ``ode`` and ``sde`` beside this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ldm.diffusion import (
    Condition,
    NoiseProcess,
    Predictor,
    RectifiedFlow,
    Target,
    VariancePreserving,
    process_of,
    scheduler_config,
    target_of,
)
from ldm.diffusion.schedulers import flow_scheduler
from ldm.sampling.bridge import Callback, Generators, SchedulerSampler
from ldm.sampling.levels import FLOW
from ldm.sampling.names import canonical
from ldm.sampling.ode import Adaptive, Heun
from ldm.sampling.process_sampler import ProcessSampler
from ldm.sampling.sde import Consistency, Ddim, Langevin, ReverseSde


class Sampler(Protocol):
    """Noise to data."""

    @property
    def process(self) -> NoiseProcess:
        """Whose levels the predictor is asked at."""
        ...

    def seen_at(self, tokens: int) -> Sampler:
        """The sampler for pictures of so many tokens (``NoiseProcess.seen_at``)."""
        ...

    def evaluations(
        self,
        steps: int,
        *,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        begin: int = 0,
    ) -> int:
        """Times that the callback is called."""
        ...

    def noised(self, x0: Tensor, eps: Tensor, *, steps: int, begin: int) -> Tensor:
        """``x0`` with noise ``eps`` where step ``begin`` of so many sets out: the ``x`` of a run
        that begins there.
        """
        ...

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
        """Samples of standard normal noise ``x``, ``b ...``, or of and to what lies between: shares
        of the noise that is gone, in the words of stock SDXL. Or of what is ``noised`` for the step
        ``begin``, from there on.
        """
        ...


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
        # Its only use in step() is N // num_inference_steps, which this makes the gap, exactly.
        number = int(timestep)  # cheaper to look up by than a tensor
        self.num_inference_steps = self._gaps[number]
        return super().step(
            model_output, number, sample, eta, generator=generator, return_dict=return_dict
        )

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """See stock."""
        super().set_timesteps(num_inference_steps, device)
        most, whole = self.config["num_train_timesteps"], [*self.timesteps.tolist(), -1]
        both = itertools.pairwise(whole)
        self._gaps = {t: Fraction(most, max(t - s, 1)) for t, s in both}  # -1 is refused later


class _UniPC(UniPCMultistepScheduler):
    """UniPC that tells the network the nearest timestep to its level: stock cuts decimals off."""

    def _sigma_to_t(self, sigma: Any, log_sigmas: Any) -> Any:
        return super()._sigma_to_t(sigma, log_sigmas).round()


class _DPM2(KDPM2DiscreteScheduler):
    """KDPM2 without a second's wait: stock looks timesteps up in tensors through NumPy."""

    def _sigma_to_t(self, sigma: Any, log_sigmas: Any) -> Any:
        return super()._sigma_to_t(np.asarray(sigma), np.asarray(log_sigmas))


@dataclass(frozen=True)
class Named:
    """A row of the table.

    Args:
        scheduler: the class that steps.
        order: of convergence in the number of steps, as tests/laws/test_gaussian.py measures it.
        pins: settings, over the defaults of the class; the noise process is added by ``sampler``.
        stochastic: draws noise at every step.
        speaks: what its ``step`` takes; what a network says else is put into those terms first.

    """

    scheduler: type[Any]
    order: int
    pins: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stochastic: bool = False
    speaks: tuple[Target, ...] = ("eps", "v", "x0")


# Trailing spacing: the first step is at the last timestep, the one level that pure noise belongs
# to, so the mean of a picture (its brightness) survives few steps: on a Gaussian N(0.7, 1) from
# pure noise the mean is off by -0.04 at 5 steps, with "leading" by -0.10 (Lin et al. 2024, section
# 3.3). "linspace" is as good there and spends one step on timestep 0. All end on sigma = 0: the
# last step returns x0_hat and leaves no noise in the latent.
#
# Methods of higher order are the exception. Evenly spaced timesteps leave them a last step from
# sigma / alpha = 0.2 (at 20 steps) to 0, which only first order can take: the error of dpm++ in a
# standard deviation of 1, 0.3, 0.1 is then -0.020, -0.059, -0.059. Even steps in log-SNR, on which
# the order of the method is proven (Lu et al. 2022a, section 3.4), make it +0.006, +0.001, -0.004,
# the rounding of timesteps included. They win from 8 steps on, with zero terminal SNR too. Karras
# spacing is worse on most of these and is off. heun, dpm2 and unipc call such steps exponential
# sigmas; without them all three are of first order too. pndm has no levels but the table's.
_EVEN_IN_LOG_SNR = {
    "timestep_spacing": "linspace",
    "use_exponential_sigmas": True,
    "use_karras_sigmas": False,
    "use_beta_sigmas": False,
}
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
        speaks=("eps", "v"),
    ),
    "heun": Named(HeunDiscreteScheduler, order=2, pins=_EVEN_IN_LOG_SNR),
    "dpm2": Named(_DPM2, order=2, pins=_EVEN_IN_LOG_SNR, speaks=("eps", "v")),
    "unipc": Named(
        _UniPC,
        order=3,  # the corrector is of one order more than the predictor
        pins={
            **_EVEN_IN_LOG_SNR,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "final_sigmas_type": "zero",
        },
    ),
    # As Stable Diffusion was published with; "trailing" has an order of 1.3. It adds what was said
    # at several levels, which is right of eps alone: on the Gaussian of the tests v would cost
    # 1.4 % of a standard deviation in the mean.
    "pndm": Named(
        PNDMScheduler,
        order=2,
        pins={
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "set_alpha_to_one": False,
        },
        speaks=("eps",),
    ),
}
FLOW_SAMPLERS: dict[str, Named] = {
    "flow-euler": Named(FlowMatchEulerDiscreteScheduler, order=1, speaks=("velocity",)),
    "flow-heun": Named(FlowMatchHeunDiscreteScheduler, order=2, speaks=("velocity",)),
}
"""Schedulers of rectified flows, which have no settings but the shift of the process."""
_ORIGINAL = "original_inference_steps"  # of the grid that a student was distilled on
_OF_A_GRID = {_ORIGINAL: 50, "clip_sample": False, "thresholding": False, "timestep_scaling": 10.0}
CONSISTENCY_SAMPLERS: dict[str, Named] = {
    "lcm": Named(LCMScheduler, order=0, pins=_OF_A_GRID, stochastic=True),
    "tcd": Named(TCDScheduler, order=0, pins=_OF_A_GRID, stochastic=True),
}
"""Schedulers of students that tell from anywhere where the way ends (``ldm.diffusion.distil``). A
denoiser tells a mean instead, and by these its samples come to no end, whatever the steps: they
have no order. Steps are taken from the grid that a folder states, else from one of 50."""
PROCESS_SAMPLERS: dict[str, Callable[[NoiseProcess, Target, float], ProcessSampler]] = {
    "ode-euler": lambda process, target, eta: Ddim(process, target),
    "ode-heun": lambda process, target, eta: Heun(process, target),
    "ode-adaptive": lambda process, target, eta: Adaptive(process, target),
    "sde": lambda process, target, eta: ReverseSde(process, target),
    "ancestral": lambda process, target, eta: Ddim(process, target, eta=1.0),
    "langevin": lambda process, target, eta: Langevin(process, target, corrections=10, r=0.22),
    "pc": lambda process, target, eta: Langevin(process, target, Ddim(process, target, eta=1.0)),
}
"""Samplers of any process, by name: (process, target, eta) -> sampler."""
# The names by which they go where no scheduler runs the process.
_AS_SCHEDULERS: dict[str, Callable[[NoiseProcess, Target, float], ProcessSampler]] = {
    "ddim": lambda process, target, eta: Ddim(process, target, eta),
    "ddpm": PROCESS_SAMPLERS["ancestral"],
    "euler": PROCESS_SAMPLERS["ode-euler"],
    "heun": PROCESS_SAMPLERS["ode-heun"],
    "lcm": lambda process, target, eta: Consistency(process, target),
}


def sampler(name: str, config: Mapping[str, Any], eta: float = 0.0) -> Sampler:
    """The named sampler on the noise process and prediction type of a ``scheduler_config.json``.

    Everything else in ``config`` (spacing, offsets, clipping, sigmas) is replaced by the table's
    pins. The names of others are known (``names``). ``ValueError`` lists the names if ``name`` is
    none of them, or none that runs the process.
    """
    name = canonical(name)
    process, target = process_of(config), target_of(config)
    if name in PROCESS_SAMPLERS:
        return PROCESS_SAMPLERS[name](process, target, eta)
    if name in FLOW_SAMPLERS:
        kind = FLOW_SAMPLERS[name].scheduler
        if not isinstance(process, RectifiedFlow):
            raise ValueError(
                f"sampler {name!r} runs the process 'rectified_flow', not {process.kind!r}"
            )
        stated = scheduler_config(process, target, flow=FlowMatchEulerDiscreteScheduler.__name__)
        return SchedulerSampler(kind, stated, eta)
    if not isinstance(process, VariancePreserving):
        if name in _AS_SCHEDULERS:
            return _AS_SCHEDULERS[name](process, target, eta)
        flow = FLOW_SAMPLERS if isinstance(process, RectifiedFlow) else ()
        raise ValueError(
            f"sampler {name!r} runs variance preserving processes, not {process.kind!r}: use one of"
            f" {', '.join([*flow, *_AS_SCHEDULERS, *PROCESS_SAMPLERS])}"
        )
    row = SAMPLERS.get(name) or CONSISTENCY_SAMPLERS[name]
    pins = dict(row.pins)
    if _ORIGINAL in pins:
        pins[_ORIGINAL] = config.get(_ORIGINAL, pins[_ORIGINAL])
    if name == "ddpm" and config.get("variance_type") == "learned_range":
        pins["variance_type"] = "learned_range"
    if target not in row.speaks:
        target = row.speaks[-1]  # v, which any level knows, before eps
    return SchedulerSampler(row.scheduler, {**scheduler_config(process, target), **pins}, eta)


def default_sampler(config: Mapping[str, Any]) -> str:
    """The name for who has no wish: ``dpm++``, or ``lcm`` of one distilled for it; of a flow
    matching scheduler its own; or ``ode-heun`` where no scheduler is run.
    """
    if isinstance(process_of(config), VariancePreserving):
        return "lcm" if _ORIGINAL in config else "dpm++"
    own = flow_scheduler(config)
    named = (name for name, row in FLOW_SAMPLERS.items() if row.scheduler.__name__ == own)
    return next(named, "ode-heun")


def own_sampler(scheduler: Any, eta: float = 0.0) -> Sampler:
    """What a folder's own scheduler stands for: itself, with all that was changed in it, or
    ``default_sampler`` where the process is not variance preserving and the scheduler, if it is
    none of flow matching, there only for stock.
    """
    config = scheduler.config
    if isinstance(scheduler, FLOW) or isinstance(process_of(config), VariancePreserving):
        return SchedulerSampler(type(scheduler), config, eta, scheduler)
    return sampler(default_sampler(config), config)
