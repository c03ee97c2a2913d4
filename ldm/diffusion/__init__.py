"""The mathematics: levels, processes, targets, objectives, conditions and random streams."""

from ldm.diffusion.condition import Condition, Denoiser, Predictor, predictor
from ldm.diffusion.level import Level
from ldm.diffusion.objective import LossTerms, Objective
from ldm.diffusion.process import TARGET_OF_PREDICTION_TYPE, NoiseProcess, Schedule
from ldm.diffusion.streams import normal, stratified, stream
from ldm.diffusion.target import Prediction, Target, coefficients, determinant

__all__ = [
    "TARGET_OF_PREDICTION_TYPE", "Condition", "Denoiser", "Level", "LossTerms", "NoiseProcess",
    "Objective", "Prediction", "Predictor", "Schedule", "Target", "coefficients", "determinant",
    "normal", "predictor", "stratified", "stream",
]  # fmt: skip
