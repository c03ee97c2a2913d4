"""What a config asks for that is allowed, but costs more than its writer may think."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ldm.config.schema import RunConfig, TrainConfig
from ldm.sampling.defaults import SamplingDefaults

_EVALUATIONS = 1_000_000
_STEPS = SamplingDefaults().num_inference_steps
_READERS = 4  # to a processor; beyond, they wait for each other


def costly(config: RunConfig) -> Iterator[str]:
    """A line for each: the key, and what it costs."""
    processors = os.cpu_count() or 1
    if config.workers != "auto" and config.workers > max(_READERS * processors, 16):
        yield (
            f"workers: {config.workers} processes read for every process of the run, on a machine"
            f" of {processors} processors: each takes memory of its own, and they are not faster"
            f" than {processors}"
        )
    validation = config.validation
    if validation is not None:
        passes = validation.images * validation.levels
        if passes > _EVALUATIONS:
            yield (
                f"validation.images: up to {validation.images:,} held-out pictures at"
                f" {validation.levels} levels pass through the network at every validation"
                f" ({validation.every}), {passes:,} in all"
            )
        suites, captions = getattr(validation, "suites", {}), getattr(validation, "captions", 0)
        pictures = len(validation.prompts) * validation.count + captions + sum(suites.values())
        passes = pictures * (validation.steps or _STEPS)
        if passes > _EVALUATIONS:
            yield (
                f"validation: {pictures:,} pictures are drawn at every validation"
                f" ({validation.every}), which takes {passes:,} passes through"
                " the network: lower validation.count or the numbers of validation.suites"
            )
    if isinstance(config, TrainConfig) and config.score:
        passes = config.score.captions * (config.score.steps or _STEPS)
        if passes > _EVALUATIONS:
            yield (
                f"score.captions: up to {config.score.captions:,} pictures of every source are"
                f" drawn at the end, which takes {passes:,} passes through the network"
            )
