"""What the network is told besides x_t and the level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ldm.diffusion.level import Level
from ldm.diffusion.names import Target
from ldm.diffusion.target import Prediction, network_input


@dataclass(frozen=True)
class Condition:
    """The condition of a batch.

    Args:
        tokens: ``b l d``, what cross-attention reads, or None.
        mask: ``b l`` bool, true where a token is real, or None. As in stock Stable Diffusion it
            does not reach the U-Net unless a config asks for it.
        pooled: ``b p``, one vector a sample, or None.
        extra: further per-sample tensors by name (the label of a class, sizes, crops, a
            low-resolution picture).
    """

    tokens: Float[Tensor, "b l d"] | None = None
    mask: Bool[Tensor, "b l"] | None = None
    pooled: Float[Tensor, "b p"] | None = None
    extra: dict[str, Shaped[Tensor, "b ..."]] = field(default_factory=dict)

    def __len__(self) -> int:
        for part in (self.tokens, self.pooled, *self.extra.values()):
            if part is not None:
                return len(part)
        raise ValueError(
            "a Condition of nothing has no length: give it tokens, pooled or extra, if only of"
            " shape (b, 0)"
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that there are by name: ``tokens``, ``mask``, ``pooled``, and those of ``extra``."""
        own = {"tokens": self.tokens, "mask": self.mask, "pooled": self.pooled}
        return {name: value for name, value in own.items() if value is not None} | self.extra

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Condition:
        """The condition of ``tensors()``."""
        own = ("tokens", "mask", "pooled")
        extra = {name: value for name, value in tensors.items() if name not in own}
        return Condition(tensors.get("tokens"), tensors.get("mask"), tensors.get("pooled"), extra)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """``function`` applied to every tensor."""
        return Condition(
            None if self.tokens is None else function(self.tokens),
            None if self.mask is None else function(self.mask),
            None if self.pooled is None else function(self.pooled),
            {name: function(value) for name, value in self.extra.items()},
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """On ``device``, floating-point tensors as ``dtype``."""
        return self.map(lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def _zip(
        self, others: Sequence[Condition], join: Callable[[list[Tensor]], Tensor]
    ) -> Condition:
        def joined(parts: list[Tensor | None], name: str) -> Tensor | None:
            present = [part for part in parts if part is not None]
            if present and len(present) != len(parts):
                raise ValueError(f"conditions differ: some have {name!r} and some do not")
            return join(present) if present else None

        every = [self, *others]
        names = sorted({name for c in every for name in c.extra})
        extra = {name: joined([c.extra.get(name) for c in every], name) for name in names}
        return Condition(
            joined([c.tokens for c in every], "tokens"),
            joined([c.mask for c in every], "mask"),
            joined([c.pooled for c in every], "pooled"),
            {name: value for name, value in extra.items() if value is not None},
        )

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch of all, in order."""
        return conditions[0]._zip(conditions[1:], torch.cat)

    def where(self, keep: Bool[Tensor, " b"], null: Condition) -> Condition:
        """The condition where ``keep`` (bool, ``b``) is true, ``null`` elsewhere; nothing is
        mixed.
        """

        def pick(pair: list[Tensor]) -> Tensor:
            mine, other = pair
            return torch.where(
                keep.to(mine.device).reshape(-1, *(1,) * (mine.ndim - 1)), mine, other
            )

        return self._zip([null], pick)


Denoiser: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]
"""Network: (x_t ``b ...``, timestep ``b``, condition) -> y ``b ...``."""

Predictor: TypeAlias = Callable[[Tensor, Level, Tensor, Condition], Prediction]
"""(x_t, its level, timestep, condition) -> Prediction. Guidance turns one Predictor into
another."""


def predictor(denoiser: Denoiser, target: Target) -> Predictor:
    """A network that was trained to predict ``target`` as a Predictor; what it says beyond the
    channels of ``x_t`` is a learned variance.
    """

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        out = denoiser(network_input(target, x_t, level), timestep, cond)
        channels = x_t.shape[1]
        if out.shape[1] <= channels:
            return Prediction(x_t, level, out, target)
        return Prediction(x_t, level, out[:, :channels], target, out[:, channels:])

    return predict
