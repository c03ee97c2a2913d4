"""Loss scaling: what keeps small gradients from vanishing in float16.

    g = grad(s L) / s,   s halved where s L has no finite gradient, doubled after 2,000 steps of one

(Micikevicius et al. 2018, section 3.2; ``torch.amp.GradScaler``). A step at which s is found too
large is left out. The numbers that are computed depend on s, so it is part of a checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from ldm.engine.nonfinite import Step
from ldm.engine.shutdown import Coordinator


class LossScale:
    """The scale of a run's losses, and how often it was too large; in other precisions than
    float16 there is none, and nothing happens.

    Args:
        scaler: by which losses are multiplied, accelerate's; its optimiser steps by it.
        optimizer: whose parameters have the gradients.
    """

    def __init__(self, scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
        self.scaler, self.optimizer = scaler, optimizer
        self.overflows = 0

    def unscale(self) -> None:
        """Divides the gradients, once there are all of a step."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def overflowed(self, step: Step, coordinator: Coordinator) -> bool:
        """Whether ``step``, whose gradient is not finite, owes that to the scale, which is lower
        then; the same in all processes. Where a loss is not finite, or the scale is 1 already, it
        is not to blame.
        """
        if self.scaler is None:
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        _, lost = coordinator.sync(wrong=not math.isfinite(step.sums["loss"]))
        lowered = not lost and self.scaler.get_scale() < before and before > 1
        self.overflows += lowered
        return lowered

    def told(self) -> dict[str, float]:
        """``loss_scale`` and ``overflows``, for the metrics."""
        if self.scaler is None:
            return {}
        return {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, as JSON."""
        if self.scaler is None:
            return None
        return {**self.scaler.state_dict(), "overflows": self.overflows}

    def load(self, state: dict[str, Any] | None) -> None:
        """Sets what ``state`` gave; a run that was none of float16 begins at the first scale."""
        if self.scaler is not None and state is not None:
            self.overflows = state["overflows"]
            self.scaler.load_state_dict(state)
