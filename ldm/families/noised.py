"""What families share whose networks are told a noised thing of the picture itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from ldm.config.aside import AsideSettings
from ldm.diffusion import DiscreteVP, VariancePreserving, scheduler_config
from ldm.errors import ConfigError
from ldm.families.index import NOISING
from ldm.families.noise import replaced, saved
from ldm.models.aside import Drawn


def aside_process(asked: AsideSettings, model: str | None) -> VariancePreserving:
    """The noise of ``asked``; what it leaves open is that of the folder ``model``, if it states
    one, else of a cosine table.
    """
    states = model is not None and (Path(model) / NOISING).is_dir()
    known = saved(model, NOISING)[0] if model and states else DiscreteVP("cosine")
    process = replaced(known, asked.process)
    if not isinstance(process, VariancePreserving):
        raise ConfigError(f"aside.process: a variance preserving one, not {process.kind!r}")
    len(process.table.alpha)  # whether its numbers are some
    return process


def noising_scheduler(process: VariancePreserving) -> Any:
    """A scheduler that nobody steps, which states the noise."""
    stated = scheduler_config(process, "eps")
    del stated["_class_name"]
    return diffusers.DDPMScheduler.from_config(stated)


def noise_level(asked: Any, scheduler: Any, usual: int) -> int:
    """``noise_level`` of a call, ``usual`` where it is None; ``ValueError`` if there is no such."""
    level, count = usual if asked is None else asked, scheduler.config["num_train_timesteps"]
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < count:
        raise ValueError(f"noise_level must be a whole number in 0..{count - 1}, not {level!r}")
    return level


def of_each(name: str, given: Tensor, pictures: Drawn) -> Tensor:
    """``given``, one for all pictures, one a prompt or one each, of each of them, ``n ...``;
    ``ValueError`` for another number.
    """
    prompts = len(pictures) // pictures.each
    if len(given) == prompts:
        return given.repeat_interleave(pictures.each, 0)
    if len(given) == 1:
        return given.expand(len(pictures), *given.shape[1:])
    if len(given) != len(pictures):
        raise ValueError(f"{name}: {len(given)} pictures for {prompts} prompts")
    return given
