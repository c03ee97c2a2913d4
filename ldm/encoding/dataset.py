"""The n-th image of a run with all that is random about it.

    item n = (moments or pixels, tokens or ids, posterior, noise, u)

What trains on it only computes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import coordinates
from ldm.data.items import Item
from ldm.diffusion import normal, stratified, stream
from ldm.encoding.encoder import Encoder
from ldm.guidance.told import SCALE


@lru_cache(maxsize=8)
def _times(seed: int, batch: int, size: int) -> np.ndarray:
    return stratified(seed, "time", batch, size)


class ImageDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th image of the run with its caption, dropout, posterior, noise and time."""

    def __init__(self, config: TrainConfig, collection: Collection, encoder: Encoder) -> None:
        self.config, self.encoder = config, encoder
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Tensors without a batch axis; every draw depends on (seed, position) alone.

        ``coordinates`` are those of ``ldm.data.images.coordinates``.
        """
        seed, batch, images = self.config.seed, self.config.batch_size, self.config.images
        item = self.item(position)
        if images.deterministic:
            views = images.views
            view = views[int(stream(seed, "flip", position).integers(len(views)))]
        else:
            view = images.view(stream(seed, "transform", position))
        caption = item.caption(stream(seed, "caption", position))
        shape, asides = self.encoder.codec.shape(*item.shape), self.encoder.asides
        return {
            "position": position,
            **self.encoder.picture(item, view),
            **self.encoder.caption(caption, self._told(position)),
            **(asides.drawn(seed, position, item.shape) if asides else {}),
            "coordinates": torch.tensor(coordinates(item.size, view, item.shape)),
            "posterior": normal(seed, "posterior", position, shape),
            "noise": normal(seed, "noise", position, shape),
            "u": _times(seed, position // batch, batch)[position % batch],
            **self._scale(position),
        }

    def _scale(self, position: int) -> dict[str, float]:
        """At what a teacher is guided, if there is one."""
        if self.config.distil is None:
            return {}
        low, high = self.config.distil.scales
        return {SCALE: low + (high - low) * stream(self.config.seed, "guidance", position).random()}

    def _told(self, position: int) -> list[bool]:
        """Whether each text tower is told the caption: all of them or none where ``text_dropout``
        is a number, each by draws of its own where it is a list.
        """
        seed, share = self.config.seed, self.config.text_dropout
        towers = self.encoder.conditioner.towers
        if isinstance(share, tuple):
            draws = {name: stream(seed, f"text dropout {name}", position) for name in towers}
            return [draws[name].random() >= s for name, s in zip(towers, share, strict=True)]
        told = stream(seed, "text dropout", position).random() >= share
        return [bool(told)] * max(1, len(towers))
