"""Guidance: Predictor -> Predictor."""

from ldm.guidance.classifier_free import ClassifierFree

__all__ = ["ClassifierFree"]
