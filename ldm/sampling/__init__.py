"""Sampling: diffusers' schedulers behind one call, and the named samplers."""

from ldm.sampling.bridge import SchedulerSampler
from ldm.sampling.samplers import SAMPLERS, Named, sampler

__all__ = ["SAMPLERS", "Named", "SchedulerSampler", "sampler"]
