"""What tells the entries of the caches apart: the content of a picture and what is seen of it, and
how captions are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL

from ldm.config.schema import TrainConfig
from ldm.data.images import ImageTransform, Shape, View, cuts
from ldm.data.items import Item, Items
from ldm.storage.tensor_cache import column_of, fingerprint, key_of


class CacheKeys:
    """Every (item, view) whose latent is to be cached, by one number."""

    def __init__(self, items: Items, views: Sequence[View]) -> None:
        self.items, self.views = items, views

    def __len__(self) -> int:
        return len(self.items) * len(self.views)

    def at(self, row: int) -> tuple[Item, View]:
        """Item and view of number ``row``."""
        item, view = divmod(row, len(self.views))
        return self.items[item], self.views[view]

    def key(self, row: int) -> bytes:
        """The key of the moments of number ``row``, by its content."""
        return latent_key(*self.at(row))

    def keys(self) -> np.ndarray:
        """All keys, S16."""
        return column_of(map(self.key, range(len(self))))


def reading(config: TrainConfig) -> dict[str, str | int | None] | None:
    """How captions become tokens where not as they are."""
    told = {"syntax": config.prompt_syntax, "windows": config.prompt_windows}
    return None if told == {"syntax": None, "windows": 1} else told


def pictures_space(
    kind: str,
    transform: ImageTransform,
    shape: Shape,
    *made_by: object,
    precision: str = "float32",
) -> str:
    """The space of what is made ``kind`` of pictures of ``shape``, and by what it is made: all that
    a view cannot change. A flip, a crop is another entry, a bucket a space of its own.
    """
    settings = (transform.background, PIL.__version__, precision)
    return fingerprint(kind, settings, shape, *made_by)


def latent_key(item: Item, view: View) -> bytes:
    """The key of the moments of a picture, by its content and by what is seen of it."""
    middle = view.place == 0.5 or not cuts(item.size, item.shape)
    return key_of(item.digest(), str(int(view.mirrored)), *([] if middle else [str(view.place)]))
