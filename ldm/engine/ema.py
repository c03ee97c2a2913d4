"""Exponential moving average of weights, with its memory counted in images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ldm.engine.shards import like


def decay(batch: int, seen: int, half_life: float, ramp: float) -> float:
    """Factor on the old average for a batch that ends at image ``seen``: 0.5 ** (batch /
    half-life).

    The half-life is at most ``ramp * seen`` (Karras et al. 2022, ema_rampup_ratio).
    """
    half_life = min(half_life, ramp * seen) if ramp > 0 else half_life
    return 0.5 ** (batch / max(half_life, 1e-8))


class Average:
    """The average of ``weights``, which it watches by reference.

    Args:
        weights: the trained parameters by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.mean = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self, factor: float) -> None:
        """Mean = factor * mean + (1 - factor) * weights."""
        means, weights = list(self.mean.values()), list(self.weights.values())
        torch._foreach_lerp_(means, weights, 1 - factor)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Sets the average."""
        for name, mean in self.mean.items():
            mean.copy_(like(values[name], mean))

    @contextmanager
    @torch.no_grad()
    def in_front(self) -> Iterator[dict[str, Tensor]]:
        """The average in place of the weights, which are handed out and come back bit for bit."""
        kept = {name: value.detach().clone() for name, value in self.weights.items()}
        for name, value in self.weights.items():
            value.copy_(self.mean[name])
        try:
            yield kept
        finally:
            for name, value in self.weights.items():
                value.copy_(kept[name])
