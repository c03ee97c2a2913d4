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

    @torch.no_grad()
    def made(self, pixels: Tensor) -> dict[str, Tensor]:
        """What is made of ``pixels`` ``b 3 h w``: in float32 also where autocast is on, so that it
        is the same cached or not.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return self.aside.made(pixels)

    def beside(self, item: Item, view: View) -> dict[str, Tensor]:
        """The hint of a picture, seen as that is, where it is told one."""
        if not self.aside.hinted:
            return {}
        return {f"{MADE}hint": self.transform(item.hint(), view, item.shape)}

    def drawn(self, seed: int, index: int, shape: Shape, name: str = "aside") -> dict[str, Tensor]:
        """What is drawn for a picture, for a batch."""
        return named(DRAWN, self.aside.drawn(seed, index, shape, name))

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
        every = zip(items, numbers, strict=True)
        rows = [
            self.beside(item, View()) | self.drawn(seed, number, item.shape, "validation aside")
            for item, number in every
        ]
        drawn = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return self.told({"pixels": pixels, **{n: x.to(pixels.device) for n, x in drawn.items()}})

    def example(self, n: int) -> dict[str, Tensor]:
        """What a batch of ``n`` images holds of it, without values."""
        side = self.transform.size
        drawn = named(DRAWN, self.aside.drawn(0, 0, (side, side)))
        one = named(MADE, self.aside.made(torch.empty(1, 3, side, side))) if self.cached else {}
        rows = {name: x[0] for name, x in one.items()} | drawn
        if self.aside.hinted:
            rows[f"{MADE}hint"] = torch.empty(3, side, side, dtype=torch.uint8)
        return {name: torch.empty(n, *x.shape, dtype=x.dtype) for name, x in rows.items()}


def named(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under names that begin with ``start``."""
    return {f"{start}{name}": value for name, value in tensors.items()}
