"""The noise process and the objective of a run: those of the config over those of its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config.noise import ProcessConfig, SizeShiftSettings, WeightingSettings
from ldm.config.schema import TrainConfig
from ldm.diffusion import (
    DiscreteVP,
    NoiseProcess,
    Objective,
    Target,
    process_of,
    scheduler_config,
    target_of,
)
from ldm.errors import ConfigError
from ldm.formats.integrity import check_scheduler, json_object
from ldm.lazy import named


def process_and_objective(config: TrainConfig) -> tuple[NoiseProcess, Objective]:
    """Those of the config; what it leaves open comes from the model folder, else the defaults.

    Raises:
        ConfigError: they do not fit each other, or no saved folder could say what they are.
    """
    process, known = DiscreteVP(), {"target": "eps"}
    if config.model and config.network is None:
        process, target, learned = saved(config.model)
        known = {"target": target, "learned_variance": learned}
    try:
        process = replaced(process, config.process)
        given = _given(config.objective)
        if "times" in given:
            given["times"] = replace(given["times"])  # a state of its own, if it has any
        objective = Objective(**known | given)
        process.refuse(objective.target)
        _check_times(objective, process)
        if not bool(objective.weight(process.table).isfinite().all()):
            raise ValueError(
                f"objective.weighting {objective.weighting!r} is infinite for target"
                f" {objective.target!r} at some level of process {process.kind!r}"
            )
        scheduler_config(process, objective.target, learned_variance=objective.learned_variance)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return process, objective


def _check_times(objective: Objective, process: NoiseProcess) -> None:
    try:
        objective.times.ends(process)
    except ValueError as error:
        raise ConfigError(f"objective.times: {error}") from None


def configured_process(settings: ProcessConfig, model: str | None) -> NoiseProcess:
    """The process of ``settings``; what they leave open is that of the folder ``model``, if there
    is one. ``ConfigError`` where its numbers cannot be.
    """
    return replaced(saved(model)[0] if model else DiscreteVP(), settings)


def replaced(process: NoiseProcess, settings: ProcessConfig) -> NoiseProcess:
    """``process`` with what ``settings`` give; ``ConfigError`` where their numbers cannot be."""
    given = _given(settings)
    if not given:
        return process  # also one that no config can state
    given.pop("kind", None)
    cls = named(settings.mirrors)
    try:
        return replace(process, **given) if type(process) is cls else cls(**given)  # type: ignore[type-var]
    except ValueError as error:
        raise ConfigError(f"process: {error}") from None


def _given(settings: Any) -> dict[str, Any]:
    """The fields that a config sets."""
    given = {k: v for k, v in vars(settings).items() if v is not None}
    for name, value in given.items():
        if isinstance(value, (WeightingSettings, SizeShiftSettings)):
            given[name] = value.made()
    return given


def saved(model: str, part: str = "scheduler") -> tuple[NoiseProcess, Target, bool]:
    """The process of a pipeline folder, what its U-Net predicts, and whether it also predicts a
    variance; ``part`` is the folder of the scheduler.
    """
    file = Path(model) / part / "scheduler_config.json"
    try:
        config = json_object(file)
        check_scheduler(config)
        learned = config.get("variance_type") == "learned_range"
        process = process_of(config)
        len(process.table.alpha)  # whether its numbers are some
        return process, target_of(config), learned
    except (OSError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"model: {file} cannot be used: {line}") from None
