"""Guidance by the gradient of a potential, log p(y | x_t) or log p(y | x0).

    eps <- eps - scale sigma grad log p,   that is   x0 <- x0 + scale (sigma^2 / alpha) grad log p

(Dhariwal & Nichol 2021, algorithm 2; for a level (alpha, sigma) Bayes' rule on the score). The
gradient is by x_t: of a potential that knows noise, or through the denoiser of one of clean data,
log p(y | x0(x_t)) (Chung et al. 2023; Bansal et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.diffusion.level import broadcast
from ldm.guidance.chain import detached, differentiable, moved, unit

Potential: TypeAlias = Callable[[Tensor, Level, Tensor, Condition], Tensor]
"""(x ``b ...``, level of x_t, timestep, condition) -> log p(y | x) up to a constant, nats, ``b``;
x is x_t / sqrt(alpha^2 + sigma^2), or x0."""


@dataclass(frozen=True)
class Gradient:
    """Guidance towards a high potential.

    Where alpha is 0 nothing is added: x_t says nothing there, so that a potential that knows noise
    has no gradient, and sigma^2 / alpha times that is 0 / 0. Its limit, the mean of x0 given y less
    that of x0, is not to be had from a gradient at alpha = 0.

    In float32 or bfloat16: the gradients underflow in float16.

    Args:
        potential: differentiable in x.
        scale: 1 is Bayes' rule; more is a sharper p(y | x)^scale.
        of: what the potential is shown: ``x_t`` at its level, or the ``x0`` that is predicted,
            which costs a backward pass of the denoiser.
    """

    potential: Potential
    scale: float = 1.0
    of: Literal["x_t", "x0"] = "x_t"

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor; ``null`` is not used."""

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            if self.of == "x0":
                x, prediction = differentiable(predict, x_t, level, timestep, cond)
            else:
                x = x_t.detach().requires_grad_()
                with torch.no_grad():
                    prediction = predict(x_t, level, timestep, cond)
            with torch.enable_grad():
                shown = prediction.x0 if self.of == "x0" else unit(x, level)
                log_p = self.potential(shown, level, timestep, cond)
                (gradient,) = torch.autograd.grad(log_p.sum(), x)
            by = self.scale * towards_x0(level, gradient) * gradient
            return moved(detached(prediction), by)

        return guided


def towards_x0(level: Level, x: Tensor) -> Tensor:
    """sigma^2 / alpha, by which a gradient by x_t moves x0, spread over ``x``; where alpha is 0
    it is infinite, and given as 0.
    """
    alpha, sigma = (broadcast(part, x) for part in level[:2])
    return torch.where(alpha > 0, sigma**2 / alpha, 0.0)


@dataclass(frozen=True)
class LabelPotential:
    """log p(label | x_t) of a classifier that knows noise.

    Args:
        classifier: (x_t / sqrt(alpha^2 + sigma^2), timestep) -> logits ``b k``.
        labels: int64, one for all ``()`` or one a sample ``b``.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor

    def __call__(self, x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Tensor:
        """Nats, ``b``."""
        log_p = self.classifier(x, timestep).log_softmax(1)
        return log_p.gather(1, self.labels.to(x.device).expand(len(x))[:, None])[:, 0]


@dataclass(frozen=True)
class ClipPotential:
    """``scale`` times the cosine between a picture's features and its text's: CLIP's logit of the
    pair, log p(text | picture) up to a constant (Nichol et al. 2022, section 2.4).

    Args:
        image: x -> features ``b p``: a tower on noised data (of x_t), or one on pictures behind
            the decoder (of x0).
        text: condition -> features ``b p``.
        scale: CLIP's own, the exponential of its ``logit_scale``.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Condition], Tensor]
    scale: float = 100.0

    def __call__(self, x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Tensor:
        """Nats up to a constant, ``b``."""
        image, text = (normalize(f, dim=-1) for f in (self.image(x), self.text(cond)))
        return self.scale * (image * text).sum(-1)
