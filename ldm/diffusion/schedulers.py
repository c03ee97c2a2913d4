"""Process and target in the words of diffusers' ``scheduler_config.json``, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion.names import Edm, Target
from ldm.diffusion.process import (
    IN_DIFFUSERS,
    ContinuousVP,
    Cosine,
    DiscreteVP,
    NoiseProcess,
    RectifiedFlow,
    Schedule,
    TrainedVP,
    VarianceExploding,
    VariancePreserving,
)
from ldm.diffusion.shift import SizeShift

FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
_PREDICTION_TYPE: dict[Target, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_config(
    process: NoiseProcess,
    target: Target,
    *,
    learned_variance: bool = False,
    flow: str | None = None,
) -> dict[str, Any]:
    """What a folder saves, ``_class_name`` included: a scheduler with which stock draws, if there
    is one.

    Args:
        process: the noise.
        target: what the network predicts.
        learned_variance: whether it also predicts a variance.
        flow: the scheduler of a rectified flow; None: DPMSolverMultistepScheduler, which unlike
            FlowMatchEulerDiscreteScheduler runs in a stock StableDiffusionPipeline, unless the
            shift goes by the size of a picture, for which it has no words.

    Raises:
        ValueError: no scheduler has words for this.
    """
    if learned_variance and not isinstance(process, VariancePreserving):
        raise ValueError(
            "a learned variance belongs to ancestral sampling of a variance preserving process,"
            f" not to process {process.kind!r}"
        )
    config, legal = _words(process, target)
    if isinstance(process, RectifiedFlow):
        config |= _flow_words(process, flow)
    if target not in legal:
        raise ValueError(
            f"diffusers' schedulers cannot express target {target!r} of process {process.kind!r}:"
            f" use one of {legal}"
        )
    if learned_variance:
        config |= {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    return {"num_train_timesteps": process.num_train_timesteps, **config}


def _words(process: NoiseProcess, target: Target) -> tuple[dict[str, Any], list[Target]]:
    """The config for ``target`` (without the length of the table), and all legal targets."""
    if isinstance(process, RectifiedFlow):
        return {}, ["velocity"]
    if isinstance(process, VarianceExploding):
        ends = {"sigma_min": process.sigma_min, "sigma_max": process.sigma_max}
        if isinstance(target, Edm):
            ends |= {"sigma_data": target.sigma_data}
            return {"_class_name": "EDMEulerScheduler", **ends, "prediction_type": "epsilon"}, [
                target
            ]
        return {"_class_name": "ScoreSdeVeScheduler", **ends, "sampling_eps": 1e-5}, [
            "score",
            Edm(),
        ]
    assert isinstance(process, VariancePreserving)
    zero = float(process.table.alpha[-1]) == 0
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": zero,
        "prediction_type": _PREDICTION_TYPE.get(target),
        # Other spacings skip the last timestep, the only one that pure noise belongs to.
        "timestep_spacing": "trailing" if zero else "leading",
        "beta_schedule": "linear",
    }
    if isinstance(process, DiscreteVP):
        config |= {"beta_start": process.beta_start, "beta_end": process.beta_end}
        config["beta_schedule"] = IN_DIFFUSERS[process.schedule]
    else:
        config["trained_betas"] = process.betas().tolist()
    if isinstance(process, ContinuousVP):  # which no scheduler reads beside trained_betas
        count = process.num_train_timesteps
        config |= {"beta_start": process.beta_min / count, "beta_end": process.beta_max / count}
    return config, [*_PREDICTION_TYPE]


def _flow_words(process: RectifiedFlow, scheduler: str | None) -> dict[str, Any]:
    shift, by_size = process.shift, isinstance(process.shift, SizeShift)
    if scheduler is None and not by_size:
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "prediction_type": "flow_prediction",
        }
    line = shift if isinstance(shift, SizeShift) else SizeShift()
    return {
        "_class_name": scheduler or FLOW_EULER,
        "shift": 1.0 if by_size else shift,
        "use_dynamic_shifting": by_size,
        "base_shift": line.base,
        "max_shift": line.max,
        "base_image_seq_len": line.start,
        "max_image_seq_len": line.stop,
    }


def flow_scheduler(config: Mapping[str, Any]) -> str | None:
    """Class of the flow matching scheduler whose ``scheduler_config.json`` this is; None: of
    none.
    """
    if "shift" not in config or config.get("use_flow_sigmas"):
        return None
    return FLOW_EULER if "base_image_seq_len" in config else "FlowMatchHeunDiscreteScheduler"


def _flow(config: Mapping[str, Any], count: int) -> RectifiedFlow:
    """The process of a flow matching scheduler."""
    if not config.get("use_dynamic_shifting"):
        return RectifiedFlow(config["shift"], count)
    kind = config.get("time_shift_type", "exponential")
    if kind != "exponential":
        raise ValueError(
            f"scheduler config: time_shift_type {kind!r} is not supported, only 'exponential'"
        )
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    if lacking := [name for name in names if config.get(name) is None]:
        raise ValueError(f"scheduler config: use_dynamic_shifting needs {lacking[0]}")
    return RectifiedFlow(SizeShift(*(config[name] for name in names)), count)


def process_of(config: Mapping[str, Any]) -> NoiseProcess:
    """The process of a ``scheduler_config.json``; ``ValueError`` names a key that has no meaning
    here.
    """
    count = config.get("num_train_timesteps", 1000)
    if flow_scheduler(config):
        return _flow(config, count)
    if config.get("use_dynamic_shifting"):
        raise ValueError("scheduler config: use_dynamic_shifting is not supported")
    if config.get("use_flow_sigmas"):
        return RectifiedFlow(config.get("flow_shift", 1.0), count)
    if "clip_denoised" in config:
        raise ValueError(
            "scheduler config: CMStochasticIterativeScheduler is of consistency models, whose"
            " networks predict no target of a process here"
        )
    if "sigma_min" in config and ("sigma_data" in config or "sampling_eps" in config):
        return VarianceExploding(config["sigma_min"], config["sigma_max"], count)
    schedules: dict[str, Schedule] = {name: own for own, name in IN_DIFFUSERS.items()}
    schedule, betas = config.get("beta_schedule", "linear"), config.get("trained_betas")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    zero = bool(config.get("rescale_betas_zero_snr", False))
    if betas is not None:
        return _trained(betas, count, start, end, zero)
    if schedule not in schedules:
        raise ValueError(
            f"scheduler config: beta_schedule {schedule!r} is not supported, only"
            f" {sorted(schedules)}, or trained_betas"
        )
    return DiscreteVP(schedules[schedule], start, end, count, zero)


def _trained(betas: Any, count: int, start: float, end: float, zero: bool) -> NoiseProcess:
    """The process on a table: one that has a formula, where it is the table of that."""
    try:
        table = tuple(float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise ValueError("scheduler config: trained_betas is no list of numbers") from None
    if not table or len(table) != count:
        raise ValueError(
            f"scheduler config: trained_betas has {len(table)} entries, and num_train_timesteps is"
            f" {count}"
        )
    for known in (ContinuousVP(start * count, end * count, count), Cosine(count)):
        if float((known.betas() - torch.tensor(table)).abs().max()) < 1e-6:
            return known
    return TrainedVP(table, zero)


def target_of(config: Mapping[str, Any]) -> Target:
    """What the network of a ``scheduler_config.json`` predicts; ``ValueError`` if it is unknown."""
    if "sampling_eps" in config:
        return "score"
    if flow_scheduler(config):
        return "velocity"
    spoken: dict[str, Target] = {name: target for target, name in _PREDICTION_TYPE.items()}
    if "sigma_data" in config:
        spoken = {"epsilon": Edm(config["sigma_data"])}
    elif config.get("use_flow_sigmas"):
        spoken = {"flow_prediction": "velocity"}
    prediction_type = str(config.get("prediction_type", "epsilon"))
    if prediction_type not in spoken:
        raise ValueError(
            f"prediction_type {prediction_type!r} is not supported, only {sorted(spoken)}"
        )
    return spoken[prediction_type]
