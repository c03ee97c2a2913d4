"""How processes together make what the caches lack, and look through it once for all runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data.images import Shape, View
from ldm.data.items import Items
from ldm.encoding.cache_keys import CacheKeys
from ldm.storage.tensor_cache import TensorCache, fingerprint


@dataclass(frozen=True)
class OfPictures:
    """What a cache holds of every view of every picture.

    Args:
        name: of it, for people who wait.
        caches: by width and height; those that are opened are put here.
        opened: the cache of a shape.
        encode: (pictures, numbers of some) -> entries, ``b ...``.
        done: called when those of a shape are made.
    """

    name: str
    caches: dict[Shape, TensorCache]
    opened: Callable[[Shape], TensorCache]
    encode: Callable[[CacheKeys, Sequence[int]], Mapping[str, Tensor]]
    done: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Filling:
    """Fills caches.

    Args:
        accelerator: the processes.
        batch: entries that are made at a time.
    """

    accelerator: Accelerator
    batch: int

    def pictures(self, kind: OfPictures, items: Items, views: Sequence[View], of: str) -> None:
        """Makes what is missing of ``kind`` of ``items``, which are told by the hash ``of``."""
        for shape, numbers in items.by_shape():
            cache = kind.caches[shape] = kind.opened(shape)
            chosen = np.zeros(len(items), bool)
            chosen[numbers] = True

            def make(
                chosen: np.ndarray = chosen,
                cache: TensorCache = cache,
                shape: Shape = shape,
            ) -> None:
                wanted = CacheKeys(items.where(chosen).distinct(), views)
                what = f"{kind.name} of {shape[0]}x{shape[1]}"
                self.build(cache, wanted.keys(), partial(kind.encode, wanted), what, "images")
                kind.done()

            self.unless_there(cache, fingerprint(of, len(views)), make)

    def unless_there(self, cache: TensorCache, of: str, make: Callable[[], None]) -> None:
        """``make`` unless all processes know that it was done before: then there is no need to go
        through a million rows to find nothing missing.
        """
        self.accelerator.wait_for_everyone()
        cache.refresh()
        there = torch.tensor([cache.covers(of)], dtype=torch.float64)
        if bool(self.accelerator.gather(there.to(self.accelerator.device)).all()):
            return
        make()
        if self.accelerator.is_main_process:
            cache.cover(of)

    def build(
        self,
        cache: TensorCache,
        keys: np.ndarray,
        make: Callable[[Sequence[int]], Mapping[str, Tensor]],
        what: str,
        unit: str,
    ) -> None:
        """Makes what ``cache`` lacks of ``keys``, each process its part of it."""
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        cache.build(keys, make, what=what, unit=unit, batch=self.batch, rank=rank, world=world)
        accelerator.wait_for_everyone()
        cache.refresh()
        # Where another run removed or lost something meanwhile, each makes what it lacks.
        cache.build(keys, make, what=what, unit=unit, batch=self.batch)
