"""How a model is drawn where nothing else is asked for: as its folder states.

``model_index.json`` states it under ``_sampling``, which stock diffusers passes over as it does all
keys with an underscore:

    "_sampling": {"guidance_scale": 3.0, "num_inference_steps": 30, "sampler": "ddim"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.sampling.names import canonical
from ldm.storage.json import read_json

KEY = "_sampling"


@dataclass(frozen=True)
class SamplingDefaults:
    """Steps, guidance and sampler of the command line, of validations and of evaluations.

    Args:
        num_inference_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
        sampler: a name that ``sampler`` knows; None: ``default_sampler`` of the noise process.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    sampler: str | None = None

    def but(self, **asked: Any) -> SamplingDefaults:
        """The same with those of ``asked`` that are not None."""
        return replace(self, **{name: value for name, value in asked.items() if value is not None})


def stated(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``model_index.json`` states, by the arguments of ``SamplingDefaults``; {} if nothing.

    Raises:
        ValueError: it is nothing to draw with.
    """
    told = index.get(KEY, {})
    steps, guidance, name = (
        told.get(key) if isinstance(told, dict) else None
        for key in ("num_inference_steps", "guidance_scale", "sampler")
    )
    # True is a number to Python, and no number of steps.
    counts = isinstance(steps, int) and steps is not True and 0 < steps <= 10_000
    scales = isinstance(guidance, int | float) and 0 <= guidance < 1000
    known = {"num_inference_steps", "guidance_scale", "sampler"}
    if not (
        isinstance(told, dict)
        and set(told) <= known
        and (steps is None or counts)
        and (guidance is None or scales)
        and (name is None or isinstance(name, str))
    ):
        shown = json.dumps(told)[:200]
        raise ValueError(f"{KEY} states nothing to draw with: {shown}; leave it out")
    return dict(told) | ({} if name is None else {"sampler": canonical(name)})


def stated_by(folder: str | Path) -> dict[str, Any]:
    """``stated`` of the folder of a pipeline; {} where it has no index."""
    file = Path(folder) / "model_index.json"
    try:
        index = read_json(file, dict[str, Any])
    except FileNotFoundError:
        return {}
    try:
        return stated(index)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
