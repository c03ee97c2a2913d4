"""The field ``aside`` of a run's YAML: what the network is told of the picture itself."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ldm.config.loader import config_class
from ldm.config.noise import ProcessConfig, ProcessSettings
from ldm.data.ranges import Share


@config_class
class AsideSettings:
    """Something of the picture itself, noised.

    Args:
        process: its noise; what is left out is that of ``model``, else of a cosine table of 1,000
            levels.
        levels: between which shares of these levels training draws one for each picture, which the
            network is told: [0, 1] all of them, [0, 0] the least noise alone.
    """

    process: ProcessConfig = field(default_factory=ProcessSettings)
    levels: tuple[Share, Share] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.levels[0] > self.levels[1]:
            raise ValueError(f"levels: {self.levels[0]} is more than {self.levels[1]}")


@config_class
class LowResolutionSettings(AsideSettings):
    """The same picture in small, noised: the network enlarges it.

    Args:
        factor: how many times smaller it is along each side.
    """

    kind: Literal["low_resolution"] = "low_resolution"
    factor: Annotated[int, Field(ge=2, le=64)] = 4


@config_class
class ImageEmbeddingSettings(AsideSettings):
    """The embedding of the picture by a CLIP's picture tower, noised: the network draws it again.

    Args:
        dropout: share of pictures of which it is told zeros, for classifier-free guidance; by draws
            of its own beside those of ``text_dropout``.
    """

    kind: Literal["image_embedding"] = "image_embedding"
    dropout: Share = 0.1


def _aside_kind(value: Any) -> str:
    """Which it is."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind or "low_resolution"


AnyAside = Annotated[
    Annotated[LowResolutionSettings, Tag("low_resolution")]
    | Annotated[ImageEmbeddingSettings, Tag("image_embedding")],
    Discriminator(_aside_kind),
]
