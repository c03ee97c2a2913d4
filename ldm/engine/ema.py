"""Exponential moving averages of weights, with their memory counted in images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.config.loader import images
from ldm.config.schema import RunConfig
from ldm.data.collection import Collection
from ldm.engine.shards import like, local
from ldm.errors import ConfigError


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
        device: where it is kept; None: with the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: str | None = None) -> None:
        self.weights, self.device = weights, device
        self.mean = {name: self._kept(value) for name, value in weights.items()}

    def _kept(self, value: Tensor) -> Tensor:
        """A copy where the average is kept."""
        value = value.detach()
        return value.clone() if self.device is None else value.to(self.device, copy=True)

    @torch.no_grad()
    def update(self, factor: float) -> None:
        """Mean = factor * mean + (1 - factor) * weights."""
        if self.device is None:
            means, weights = ([local(v) for v in d.values()] for d in (self.mean, self.weights))
            torch._foreach_lerp_(means, weights, 1 - factor)
            return
        for name, value in self.weights.items():  # one by one: all at once they may not fit
            self.mean[name].lerp_(value.detach().to(self.device), 1 - factor)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Sets the average."""
        for name, mean in self.mean.items():
            mean.copy_(like(values[name], mean))

    @contextmanager
    @torch.no_grad()
    def in_front(self) -> Iterator[dict[str, Tensor]]:
        """The average in place of the weights, which are handed out and come back bit for bit."""
        kept = {name: self._kept(value) for name, value in self.weights.items()}
        for name, value in self.weights.items():
            value.copy_(self.mean[name])
        try:
            yield kept
        finally:
            for name, value in self.weights.items():
                value.copy_(kept[name])


class Averages:
    """Averages with several half-lives, one of which is the model.

    Args:
        members: by half-life in images; the first is the model until ``choose`` finds a better one.
        ramp: see ``decay``.
        every: steps between two updates.
    """

    def __init__(self, members: Mapping[int, Average], ramp: float, every: int = 1) -> None:
        self.members, self.ramp, self.chosen = dict(members), ramp, next(iter(members))
        self.every = every
        self.chosen_at: int | None = None  # images seen when it was last chosen

    @property
    def model(self) -> Average:
        """The one that is the model."""
        return self.members[self.chosen]

    @property
    def others(self) -> dict[int, Mapping[str, Tensor]]:
        """Means of the rest, by half-life."""
        return {h: member.mean for h, member in self.members.items() if h != self.chosen}

    def update(self, batch: int, seen: int) -> None:
        """Takes the weights in after a batch that ends at image ``seen``, if it is time to."""
        if (seen // batch) % self.every:
            return
        ends = [seen - n * batch for n in range(self.every)]
        for half_life, member in self.members.items():
            member.update(math.prod(decay(batch, end, half_life, self.ramp) for end in ends))

    @property
    def choice(self) -> list[int | None]:
        """What a checkpoint keeps of it beside the averages."""
        return [self.chosen, self.chosen_at]

    def load(
        self,
        choice: Sequence[int | None] | None,
        model: Mapping[str, Tensor],
        others: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        """Sets the averages of a checkpoint, ``choice`` being its own; one that it lacks begins as
        ``model``.
        """
        for half_life, member in self.members.items():
            member.load(others.get(half_life, model))
        chosen, self.chosen_at = choice or (None, None)
        self.chosen = chosen if chosen in self.members else self.chosen

    def choose(self, seen: int, measure: Callable[[Average], float]) -> dict[str, float]:
        """Makes the one of which ``measure`` gives the least held-out loss the model, and tells
        the losses; nothing if there is only one.
        """
        if len(self.members) == 1:
            return {}
        self.chosen_at = seen
        losses = {h: measure(member) for h, member in self.members.items()}
        self.chosen = min(losses, key=losses.__getitem__)
        told = {f"held_out_loss/ema_{h}": loss for h, loss in losses.items()}
        return {"ema_half_life": float(self.chosen), **told}


def averages(
    config: RunConfig, weights: Mapping[str, Tensor], collection: Collection
) -> Averages | None:
    """Those that ``config`` asks for.

    Raises:
        ConfigError: there are several, and no held-out pictures to choose by; or it is to be on
            the host, and the weights are in shards.
    """
    if config.ema is None:
        return None
    if config.ema.device and any(isinstance(weight, DTensor) for weight in weights.values()):
        raise ConfigError("ema.device: in shards (FSDP) it is with the weights: leave it out")
    several, validation = len(config.ema.half_lives) > 1, config.validation
    if several and not (validation and validation.images and collection.held_out):
        raise ConfigError(
            "ema.half_life: held-out loss chooses among several, and there is none: set"
            " validation.images and hold pictures out, or name one half-life"
        )
    found = [images(one, config.batch_size, collection.epoch) for one in config.ema.half_lives]
    ema = config.ema
    members = {half_life: Average(weights, ema.device) for half_life in found}
    return Averages(members, ema.ramp, ema.every)
