"""Losses that fit s(x) to the gradient of log p(x), each up to a constant E |s - grad log p|^2 / 2.

implicit: Hyvarinen 2005, theorem 1. sliced: Song et al. 2019, with variance reduction. denoising:
Vincent 2011, for x = alpha x0 + sigma eps. ``Objective`` is the last one for a network and
all levels; these are for any differentiable function and one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.func import jacrev, jvp, vmap

from ldm.diffusion.level import Level

Score: TypeAlias = Callable[[Tensor], Tensor]
"""``b d`` -> ``b d``, each row a function of its own row alone."""


def implicit(score: Score, x: Tensor) -> Tensor:
    """tr(grad s) + |s|^2 / 2 with the exact trace (d backward passes), ``b``."""

    def alone(row: Tensor) -> Tensor:
        return score(row[None])[0]

    def trace(row: Tensor) -> Tensor:
        return jacrev(alone)(row).trace()

    return vmap(trace)(x) + score(x).square().sum(1) / 2


def sliced(score: Score, x: Tensor, v: Tensor) -> Tensor:
    """V . (grad s) v + |s|^2 / 2 for directions ``v`` (``b d``) with E[v v^T] = 1, ``b``."""
    s, along = jvp(score, (x,), (v,))[:2]
    return (v * along).sum(1) + s.square().sum(1) / 2


def denoising(score: Score, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """|s(x) + eps / sigma|^2 / 2 at x = alpha x0 + sigma eps, ``b``."""
    x = level.alpha * x0 + level.sigma * eps
    return (score(x) + eps / level.sigma).square().sum(1) / 2
