"""What the network is told of the pictures of a run, from a cache or made where it is needed.

In a batch what is made of a picture stands as ``aside:NAME``, and what is drawn for it as
``drawn:NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.data.images import ImageTransform, Shape, View
from ldm.data.items import Item
from ldm.encoding.cache_keys import pictures_space
from ldm.models.aside import Aside
from ldm.models.tf32 import exact
from ldm.storage.cache_root import cache_root
from ldm.storage.tensor_cache import TensorCache

MADE, DRAWN = "aside:", "drawn:"


class Asides:
    """The asides of a run.

    Args:
        aside: what the network is told.
        transform: of the pictures.
        cached: whether what is made is made once and for all.
    """

    def __init__(self, aside: Aside, transform: ImageTransform, *, cached: bool) -> None:
        self.aside, self.transform, self.cached = aside, transform, cached
        self.caches: dict[Shape, TensorCache] = {}  # by width and height

    def cache(self, shape: Shape) -> TensorCache:
        """The cache of pictures of this shape."""
        network = self.aside.network
        made_by = () if network is None else (network,)
        told = self.aside.printed, *made_by
        space = pictures_space("asides", self.transform, shape, *told)
        return TensorCache(cache_root() / "asides", space)

    @property
    def unread(self) -> list[str]:
        """Folders of the networks that no step reads, all that they make being cached."""
        return [self.aside.part] if self.cached and self.aside.part else []

    def made(self, pixels: Tensor) -> dict[str, Tensor]:
        """What is made of ``pixels`` ``b 3 h w``, where they are: in float32 also where autocast is
        on, so that it is the same cached or not.
        """
        network = self.aside.network
        if network is not None and next(network.parameters()).device != pixels.device:
            network.to(pixels.device)
        with exact(pixels.device.type):
            return self.aside.made(pixels)

    def beside(self, items: Sequence[Item], views: Sequence[View]) -> dict[str, Tensor]:
        """The hints of pictures of one shape, seen as those are, ``b 3 h w``, where the network is
        told some.
        """
        if not self.aside.hinted:
            return {}
        hints = [self.transform(i.hint(), v, i.shape) for i, v in zip(items, views, strict=True)]
        return {f"{MADE}hint": torch.stack(hints)}

    def drawn(
        self, seed: int, indexes: Sequence[int], shape: Shape, name: str = "aside"
    ) -> dict[str, Tensor]:
        """What is drawn for pictures of one shape, for a batch, ``b ...``."""
        rows = [self.aside.drawn(seed, index, shape, name) for index in indexes]
        return named(DRAWN, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    def told(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Condition.extra`` of a batch."""
        made, drawn = (
            {name.removeprefix(start): x for name, x in batch.items() if name.startswith(start)}
            for start in (MADE, DRAWN)
        )
        return self.aside.told(made or self.made(batch["pixels"]), drawn)

    def evaluated(
        self, pixels: Tensor, items: Sequence[Item], seed: int, numbers: Sequence[int]
    ) -> dict[str, Tensor]:
        """``Condition.extra`` of held-out pictures ``b 3 h w``, which meet the same draws every
        time.
        """
        drawn = self.beside(items, [View()] * len(items))
        drawn |= self.drawn(seed, numbers, items[0].shape, "validation aside")
        return self.told({"pixels": pixels, **{n: x.to(pixels.device) for n, x in drawn.items()}})

    def example(self, n: int) -> dict[str, Tensor]:
        """What a batch of ``n`` images holds of it, without values."""
        side, network = self.transform.size, self.aside.network
        rows = self.drawn(0, [0], (side, side))
        if self.cached:
            here = None if network is None else next(network.parameters()).device
            rows |= named(MADE, self.aside.made(torch.empty(1, 3, side, side, device=here)))
        if self.aside.hinted:
            rows[f"{MADE}hint"] = torch.empty(1, 3, side, side, dtype=torch.uint8)
        return {name: torch.empty(n, *x.shape[1:], dtype=x.dtype) for name, x in rows.items()}


def named(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under names that begin with ``start``."""
    return {f"{start}{name}": value for name, value in tensors.items()}
