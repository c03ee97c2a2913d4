"""The mathematics: levels, processes, targets, objectives, conditions and random streams."""

from typing import TYPE_CHECKING

from ldm.lazy import front

if TYPE_CHECKING:
    from ldm.diffusion.condition import Condition, Denoiser, Predictor, predictor
    from ldm.diffusion.level import Level
    from ldm.diffusion.names import Edm, Schedule, Target, TargetName, WeightingName
    from ldm.diffusion.objective import LossTerms, Objective, Weighting
    from ldm.diffusion.process import (
        ContinuousVP,
        Cosine,
        DiscreteVP,
        NoiseProcess,
        RectifiedFlow,
        TrainedVP,
        VarianceExploding,
        VariancePreserving,
    )
    from ldm.diffusion.schedulers import process_of, scheduler_config, target_of
    from ldm.diffusion.streams import Streams, normal, normals, stratified, stream
    from ldm.diffusion.target import Prediction, coefficients, determinant

__all__ = [
    "Condition", "ContinuousVP", "Cosine", "Denoiser", "DiscreteVP", "Edm", "Level", "LossTerms",
    "NoiseProcess", "Objective", "Prediction", "Predictor", "RectifiedFlow", "Schedule", "Streams",
    "Target", "TargetName", "TrainedVP", "VarianceExploding", "VariancePreserving", "Weighting",
    "WeightingName", "coefficients", "determinant", "normal", "normals", "predictor", "process_of",
    "scheduler_config", "stratified", "stream", "target_of",
]  # fmt: skip
__getattr__, __dir__ = front(
    __name__,
    {
        "ldm.diffusion.condition": "Condition Denoiser Predictor predictor",
        "ldm.diffusion.level": "Level",
        "ldm.diffusion.names": "Edm Schedule Target TargetName WeightingName",
        "ldm.diffusion.objective": "LossTerms Objective Weighting",
        "ldm.diffusion.process": "ContinuousVP Cosine DiscreteVP NoiseProcess RectifiedFlow"
        " TrainedVP VarianceExploding VariancePreserving",
        "ldm.diffusion.schedulers": "process_of scheduler_config target_of",
        "ldm.diffusion.streams": "Streams normal normals stratified stream",
        "ldm.diffusion.target": "Prediction coefficients determinant",
    },
)
