"""The n-th image of a run with all that is random about it.

    item n = (moments or pixels, tokens or ids, posterior, noise, u)

What trains on it only computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import View, coordinates
from ldm.data.items import Item
from ldm.diffusion import Streams, normals, stratified
from ldm.encoding.encoder import Encoder
from ldm.guidance.told import SCALE


@lru_cache(maxsize=8)
def _times(seed: int, batch: int, size: int) -> np.ndarray:
    return stratified(seed, "time", batch, size)


class ImageDraws(Dataset[dict[str, Tensor]]):
    """Item n: the n-th image of the run with its caption, dropout, posterior, noise and time."""

    def __init__(self, config: TrainConfig, collection: Collection, encoder: Encoder) -> None:
        self.config, self.encoder = config, encoder
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self._stream = collection.epoch is None

    @property
    def one_reader(self) -> bool:
        """Whether no picture is decoded, or a stream is."""
        return self._stream or bool(self.encoder.latents)

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """``__getitems__`` of one position, without the batch axis."""
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """The finished batch of ``positions``, of pictures of one shape; every draw depends on
        (seed, position) alone.

        ``coordinates`` are those of ``ldm.data.images.coordinates``.
        """
        seed, batch = self.config.seed, self.config.batch_size
        items, views = [self.item(position) for position in positions], self._views(positions)
        draws, both = Streams(seed, "caption"), [*zip(items, positions, strict=True)]
        captions = [item.caption(draws[position]) for item, position in both]
        seen = [coordinates(i.size, v, i.shape) for i, v in zip(items, views, strict=True)]
        size, asides = items[0].shape, self.encoder.asides
        shape = self.encoder.codec.shape(*size)
        times = [_times(seed, position // batch, batch)[position % batch] for position in positions]
        return {
            "position": torch.tensor(positions),
            **self.encoder.pictures(items, views),
            **self.encoder.captions(captions, self._told(positions)),
            **(asides.drawn(seed, positions, size) if asides else {}),
            "coordinates": torch.tensor(seen),
            "posterior": normals(seed, "posterior", positions, shape),
            "noise": normals(seed, "noise", positions, shape),
            "u": torch.tensor(times, dtype=torch.float64),
            **self._scale(positions),
        }

    def _views(self, positions: Sequence[int]) -> list[View]:
        """How the pictures are seen."""
        images = self.config.images
        if not images.deterministic:
            draws = Streams(self.config.seed, "transform")
            return [images.view(draws[position]) for position in positions]
        views, draws = images.views, Streams(self.config.seed, "flip")
        return [views[int(draws[position].integers(len(views)))] for position in positions]

    def _scale(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """At what a teacher is guided, if there is one."""
        if self.config.distil is None:
            return {}
        (low, high), draws = self.config.distil.scales, Streams(self.config.seed, "guidance")
        scales = [low + (high - low) * draws[position].random() for position in positions]
        return {SCALE: torch.tensor(scales, dtype=torch.float64)}

    def _told(self, positions: Sequence[int]) -> list[list[bool]]:
        """Whether each text tower is told the caption, ``b towers``: all of them or none where
        ``text_dropout`` is a number, each by draws of its own where it is a list.
        """
        seed, share = self.config.seed, self.config.text_dropout
        towers = self.encoder.conditioner.towers
        if isinstance(share, tuple):
            streams = [Streams(seed, f"text dropout {name}") for name in towers]
            both = [*zip(streams, share, strict=True)]
            return [[draws[n].random() >= s for draws, s in both] for n in positions]
        draws, many = Streams(seed, "text dropout"), max(1, len(towers))
        return [[draws[position].random() >= share] * many for position in positions]
