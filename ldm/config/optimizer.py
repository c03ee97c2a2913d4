"""The ``optimizer`` of a run's YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm.config.loader import Duration, config_class
from ldm.data.ranges import Share

Decay = Annotated[float, Field(ge=0, lt=1)]


@config_class
class AdamW:
    """AdamW and its learning rate, a function of images seen.

    Args:
        lr: peak learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay (Loshchilov & Hutter 2019); not on vectors (norms and biases).
        clip_norm: largest norm of the gradient of the global batch.
        warmup: linear from 0.
        schedule: what follows until the end of the run.
        cooldown: the schedule falls over this much at the end of the run, and the rate is constant
            before (Hagele et al. 2024): a run can be made longer from where it began to fall. None:
            it falls all the way.
        final: last learning rate as a fraction of ``lr``.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup: Duration = "0 steps"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0
    cooldown: Duration | None = None

    def __post_init__(self) -> None:
        if self.cooldown is not None and self.schedule == "constant":
            raise ValueError(
                "optimizer.cooldown: a constant schedule does not fall: set optimizer.schedule to"
                " linear or cosine, or leave this out"
            )

    def factors(self) -> dict[str, float]:
        """What multiplies ``lr`` in parts that have a learning rate of their own."""
        return {}


@config_class
class TextToImageAdamW(AdamW):
    """AdamW for the network that predicts and for text encoders.

    Args:
        text_encoder_lr: peak learning rate of all text encoders, on the same schedule; None:
            ``lr``.
    """

    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None

    def factors(self) -> dict[str, float]:
        """What multiplies ``lr`` in parts that have a learning rate of their own."""
        own = self.text_encoder_lr
        return {} if own is None else {"text_encoder": own / self.lr}
