"""Guidance: Predictor -> Predictor."""

from ldm.guidance.chain import Chain, Guidance, moved, unit
from ldm.guidance.classifier_free import ClassifierFree, Projection
from ldm.guidance.gradient import ClipPotential, Gradient, LabelPotential, Potential
from ldm.guidance.inverse import LinearInverse, Operator
from ldm.guidance.replacement import Replacement
from ldm.guidance.threshold import Threshold
from ldm.guidance.told import ToldScale

__all__ = [
    "Chain", "ClassifierFree", "ClipPotential", "Gradient", "Guidance", "LabelPotential",
    "LinearInverse", "Operator", "Potential", "Projection", "Replacement", "Threshold", "ToldScale",
    "moved",
    "unit",
]  # fmt: skip
