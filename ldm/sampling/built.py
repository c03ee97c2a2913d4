"""Schedulers of diffusers, each made once for all calls with its config."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ldm.sampling.levels import arguments


def built(scheduler: type[Any], config: Mapping[str, Any]) -> Any:
    """The one scheduler of a class with ``config``, which nobody may change: calls run copies.

    Not ``from_config``, which drops values that were set after construction.
    """
    known = arguments(scheduler.__init__)
    told = {key: config[key] for key in sorted(config) if key in known}
    return _built(scheduler, pickle.dumps(told))


@lru_cache(64)
def _built(scheduler: type[Any], told: bytes) -> Any:
    # KDPM2 takes 0.25 s of a CPU, at every call of a pipeline: it begins with a thousand steps.
    return scheduler(**pickle.loads(told))
