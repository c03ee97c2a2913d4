"""Features of true pictures, made once and found again by whoever compares with the same ones.

    file = SHA-256 of (the network, how it is shown pictures; the pictures, how they are cut)

under ``$LDM_CACHE/features``. Only what a network makes is kept: pixels are quicker made than read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.data.cache import fingerprint
from ldm.data.collection import Items, spread
from ldm.data.images import ImageTransform, to_pixels
from ldm.data.source import cache_root
from ldm.evaluation.features import Space

log = logging.getLogger(__name__)

AT_MOST = 10_000


class TrueFeatures:
    """Features of the pictures of one data set in any space.

    Args:
        told: tells the pictures from others, and how they are cut, by anything with a repr.
        pictures: makes them, ``3 h w`` in [-1, 1].
    """

    def __init__(
        self, told: Callable[[], object], pictures: Callable[[], Iterable[Tensor]]
    ) -> None:
        self._told, self._pictures = told, pictures
        self._known: dict[str, Tensor] = {}

    def __call__(self, space: Space) -> Tensor:
        """``n d``, float32."""
        if space.name not in self._known:
            self._known[space.name] = self._found(space)
        return self._known[space.name]

    def _found(self, space: Space) -> Tensor:
        if not space.made_by:
            return space(self._pictures())
        # The weights are what counts, wherever they lie.
        kind = space.name.partition(":")[0]
        name = fingerprint(*space.made_by, kind, self._told())[:32]
        file = cache_root() / "features" / f"{name}.safetensors"
        if file.is_file():
            try:
                return load_file(file)["features"]
            except (SafetensorError, OSError, KeyError) as error:
                log.warning("%s cannot be read and is made again: %s", file, error)
        features = space(self._pictures())
        _write(features, file)
        return features


def _write(features: Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}-{os.getpid()}.partial")
    try:
        save_file({"features": features.contiguous()}, partial)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def of_items(items: Items, transform: ImageTransform) -> TrueFeatures:
    """Those of ``items``, of more than ``AT_MOST`` of so many at even distances, as squares."""
    chosen = spread(items, AT_MOST)

    def told() -> object:
        digests = "".join(item.digest() for item in chosen)
        return hashlib.sha256(digests.encode()).hexdigest(), transform.size, transform.background

    return TrueFeatures(told, lambda: (to_pixels(transform(item.load())) for item in chosen))


def of_tensor(pictures: Tensor) -> TrueFeatures:
    """Those of ``n 3 h w`` in [-1, 1]."""

    def told() -> object:
        raw = pictures.contiguous().numpy().tobytes()
        return hashlib.sha256(raw).hexdigest(), tuple(pictures.shape)

    return TrueFeatures(told, lambda: pictures)
