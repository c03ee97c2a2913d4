"""Features of true pictures, made once and found again by whoever compares with the same ones.

    file = SHA-256 of (the network, how it is shown pictures; the pictures, how they are cut)

under ``$LDM_CACHE/features``. Only what a network makes is kept: pixels are quicker made than read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import PIL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.data.images import ImageTransform, to_pixels
from ldm.data.items import Items, evenly_spaced
from ldm.evaluation.features import Space
from ldm.progress import track
from ldm.storage.cache_root import cache_root
from ldm.storage.disk import atomic_write
from ldm.storage.tensor_cache import fingerprint
from ldm.storage.tensors import write_tensors

log = logging.getLogger(__name__)

AT_MOST = 10_000


class TrueFeatures:
    """Features of pictures in any space; the pictures are read where they are not known yet.

    Args:
        digests: of each picture a hash of what it is made from.
        pictures: makes them, ``3 h w`` in [-1, 1], in the same order.
        transform: has cut them, as squares.
    """

    def __init__(
        self,
        digests: Callable[[], Iterable[str]],
        pictures: Callable[[], Iterable[Tensor]],
        transform: ImageTransform,
    ) -> None:
        self._digests, self._pictures, self._transform = digests, pictures, transform
        self._known: dict[str, Tensor] = {}

    def __call__(self, space: Space) -> Tensor:
        """``n d``, float32."""
        if space.name not in self._known:
            kept = self._kept(space) if space.made_by else self._made(space)
            self._known[space.name] = kept
        return self._known[space.name]

    def _made(self, space: Space) -> Tensor:
        return space(track(self._pictures(), f"looking at true pictures as {space.name}"))

    def _kept(self, space: Space) -> Tensor:
        # Another Pillow may scale otherwise. The weights are what counts, wherever they lie.
        cut = self._transform.size, self._transform.background, PIL.__version__
        pictures = hashlib.sha256("".join(self._digests()).encode()).hexdigest()
        name = fingerprint(*space.made_by, space.name.partition(":")[0], pictures, cut)[:32]
        file = cache_root() / "features" / f"{name}.safetensors"
        if file.is_file():
            try:
                return load_file(file)["features"]
            except (SafetensorError, OSError, KeyError) as error:
                log.warning("%s cannot be read and is made again: %s", file, error)
        features = self._made(space)
        try:
            _write(features, file)
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be written, and is made again next time: %s", file, error)
        return features


def _write(features: Tensor, file: Path) -> None:
    with atomic_write(file) as partial:
        write_tensors({"features": features}, partial)


def of_items(items: Items, transform: ImageTransform) -> TrueFeatures:
    """Those of ``items``; of more than ``AT_MOST`` of so many at even distances."""
    chosen = evenly_spaced(items, AT_MOST)
    return TrueFeatures(
        lambda: (item.digest() for item in chosen),
        lambda: (to_pixels(transform(item.load())) for item in chosen),
        transform,
    )
