"""The mathematics: levels, processes, targets, objectives, conditions and random streams."""

from ldm.diffusion.condition import Condition, Denoiser, Predictor, predictor
from ldm.diffusion.level import Level
from ldm.diffusion.objective import LossTerms, Objective, Weighting, WeightingName
from ldm.diffusion.process import (
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
from ldm.diffusion.schedulers import target_of
from ldm.diffusion.streams import normal, stratified, stream
from ldm.diffusion.target import Edm, Prediction, Target, TargetName, coefficients, determinant

__all__ = [
    "Condition", "ContinuousVP", "Cosine", "Denoiser", "DiscreteVP", "Edm", "Level", "LossTerms",
    "NoiseProcess", "Objective", "Prediction", "Predictor", "RectifiedFlow", "Schedule", "Target",
    "TargetName", "TrainedVP", "VarianceExploding", "VariancePreserving", "Weighting",
    "WeightingName", "coefficients", "determinant", "normal", "predictor", "stratified", "stream",
    "target_of",
]  # fmt: skip
