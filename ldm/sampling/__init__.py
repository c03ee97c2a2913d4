"""Sampling: diffusers' schedulers behind one call, samplers of any process, and their names."""

from typing import TYPE_CHECKING

from ldm.lazy import front

if TYPE_CHECKING:
    from ldm.sampling.bridge import SchedulerSampler
    from ldm.sampling.defaults import SamplingDefaults
    from ldm.sampling.ode import Adaptive, Heun, slerp
    from ldm.sampling.process_sampler import ProcessSampler
    from ldm.sampling.samplers import (
        CONSISTENCY_SAMPLERS,
        FLOW_SAMPLERS,
        PROCESS_SAMPLERS,
        SAMPLERS,
        Named,
        Sampler,
        default_sampler,
        own_sampler,
        sampler,
    )
    from ldm.sampling.sde import Consistency, Ddim, Langevin, ReverseSde

__all__ = [
    "CONSISTENCY_SAMPLERS", "FLOW_SAMPLERS", "PROCESS_SAMPLERS", "SAMPLERS", "Adaptive",
    "Consistency", "Ddim", "Heun", "Langevin", "Named",
    "ProcessSampler", "ReverseSde", "Sampler", "SamplingDefaults", "SchedulerSampler",
    "default_sampler", "own_sampler", "sampler", "slerp",
]  # fmt: skip
__getattr__, __dir__ = front(
    __name__,
    {
        "ldm.sampling.bridge": "SchedulerSampler",
        "ldm.sampling.defaults": "SamplingDefaults",
        "ldm.sampling.ode": "Adaptive Heun slerp",
        "ldm.sampling.process_sampler": "ProcessSampler",
        "ldm.sampling.samplers": "CONSISTENCY_SAMPLERS FLOW_SAMPLERS PROCESS_SAMPLERS SAMPLERS"
        " Named Sampler default_sampler own_sampler sampler",
        "ldm.sampling.sde": "Consistency Ddim Langevin ReverseSde",
    },
)
