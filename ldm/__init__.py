"""Latent text-to-image diffusion: ``from ldm import LatentDiffusionPipeline``."""

from typing import TYPE_CHECKING

from ldm.lazy import front

if TYPE_CHECKING:
    from ldm.diffusion import (
        ContinuousVP,
        Cosine,
        DiscreteVP,
        Objective,
        RectifiedFlow,
        VarianceExploding,
        Weighting,
    )
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.sampling import sampler

__all__ = [
    "ContinuousVP", "Cosine", "DiscreteVP", "LatentDiffusionPipeline", "Objective", "RectifiedFlow",
    "VarianceExploding", "Weighting", "sampler",
]  # fmt: skip
__getattr__, __dir__ = front(
    __name__,
    {
        "ldm.pipeline": "LatentDiffusionPipeline",
        "ldm.diffusion": "ContinuousVP Cosine DiscreteVP Objective RectifiedFlow VarianceExploding"
        " Weighting",
        "ldm.sampling": "sampler",
    },
)
