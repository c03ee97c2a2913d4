"""What all guidance has in common: Predictor -> Predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor, determinant
from ldm.diffusion.level import broadcast

Guidance: TypeAlias = Callable[[Predictor, Condition], Predictor]
"""(predictor, the condition that says nothing: of the batch's length, or 1) -> what serves one call
of a sampler in its place: it may remember its evaluations."""


@dataclass(frozen=True)
class Chain:
    """Several after each other, the first next to the network.

    ClassifierFree comes first: it asks what is before it for 2 b samples, with and without the
    condition, and a LinearInverse or a LabelPotential of b would not know them. At most one
    Gradient of x0 or LinearInverse, before any Gradient of x_t: they cut the gradient off for those
    behind them.
    """

    parts: tuple[Guidance, ...]

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The predictor guided by all."""
        for part in self.parts:
            predict = part(predict, null)
        return predict


def moved(prediction: Prediction, by: Tensor) -> Prediction:
    """The prediction with ``by`` (``b ...``) added to x0: y - (d / sigma) by, in its own space.

    Nothing is rounded where ``by`` is 0.
    """
    level = prediction.level.like(prediction.y)
    gain = determinant(prediction.target, level) / level.sigma
    return replace(prediction, y=prediction.y - (gain * by).to(prediction.y.dtype))


def unit(x_t: Tensor, level: Level) -> Tensor:
    """x_t / sqrt(alpha^2 + sigma^2), ``b ...``: of variance 1 at every level of every process if
    the data have it.
    """
    return x_t / broadcast((level.alpha**2 + level.sigma**2).sqrt(), x_t).to(x_t.dtype)


def differentiable(
    predict: Predictor, x_t: Tensor, level: Level, timestep: Tensor, cond: Condition
) -> tuple[Tensor, Prediction]:
    """A copy of ``x_t``, and a prediction of it that has a gradient by the copy, also where
    gradients are off.

    Raises:
        ValueError: something inside has cut the gradient off.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        prediction = predict(x, level, timestep, cond)
        if not prediction.y.requires_grad:
            raise ValueError(
                "guidance by a gradient through the network cannot wrap another one: of a Chain's"
                " parts only one Gradient of x0 or LinearInverse, before any Gradient of x_t"
            )
    return x, prediction


def detached(prediction: Prediction) -> Prediction:
    """The same without gradients."""
    variance = prediction.variance
    return replace(
        prediction,
        x_t=prediction.x_t.detach(),
        y=prediction.y.detach(),
        variance=None if variance is None else variance.detach(),
    )
