"""Latent text-to-image diffusion: ``from ldm import LatentDiffusionPipeline``."""

from typing import TYPE_CHECKING

from ldm.lazy import front

if TYPE_CHECKING:
    from ldm.cascade import Cascade
    from ldm.diffusion import (
        Condition,
        ContinuousVP,
        Cosine,
        DiscreteVP,
        Objective,
        RectifiedFlow,
        VarianceExploding,
        Weighting,
        predictor,
    )
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.sampling import Heun, sampler

__all__ = [
    "Cascade", "Condition", "ContinuousVP", "Cosine", "DiscreteVP", "Heun",
    "LatentDiffusionPipeline", "Objective", "RectifiedFlow", "VarianceExploding", "Weighting",
    "predictor", "sampler",
]  # fmt: skip
__getattr__, __dir__ = front(
    __name__,
    {
        "ldm.pipeline": "LatentDiffusionPipeline",
        "ldm.cascade": "Cascade",
        "ldm.diffusion": "Condition ContinuousVP Cosine DiscreteVP Objective RectifiedFlow"
        " VarianceExploding Weighting predictor",
        "ldm.sampling": "Heun sampler",
    },
)
