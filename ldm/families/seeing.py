"""How a family of models sees pictures: by an autoencoder, or by the picture tower of a CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ldm.config.learning import CONTROLNET
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.models.aside import Aside
from ldm.models.codec import Codec, codec_of
from ldm.models.control import Hint


class Seeing:
    """What becomes of a picture before the network that predicts is asked."""

    name: ClassVar[str]
    network: ClassVar[str]

    picture_tower: ClassVar[bool] = False
    """Whether its models have the picture tower of a CLIP (``ldm.families.picture_tower``)."""

    statistics: ClassVar[tuple[str, str, str] | None] = None
    """Folder of the network that keeps mean and standard deviation of embeddings, and its names
    for both; None: there are none."""

    @property
    def own(self) -> set[str]:
        """Folders that every run writes of itself, also where others of its model only lie beside
        it: of the network that predicts, of the scheduler, and of ``statistics``.
        """
        return {self.network, "scheduler", *(self.statistics or ())[:1]}

    def codec(self, parts: Mapping[str, Any]) -> Codec:
        """What makes latents of pictures, of a model of the components ``parts``."""
        return codec_of(parts.get("vae"))

    def aside(self, config: TrainConfig, model: Any) -> Aside | None:
        """What the network is told of the picture itself in a run; None: nothing.

        Raises:
            ConfigError: it cannot be told this.
        """
        if config.aside is not None:
            raise ConfigError(
                f"aside: a model of the family {self.name} is told nothing of the picture itself:"
                " leave it out"
            )
        return Hint() if CONTROLNET in config.learns else None

    def further(
        self, config: TrainConfig, networks: Mapping[str, Any], *, meta: bool
    ) -> dict[str, Any]:
        """Networks by their folders that it has beside autoencoder, towers and the one that
        predicts.

        Args:
            config: the run.
            networks: those that are made.
            meta: shapes only.

        Raises:
            ConfigError: they cannot be read.
        """
        return {}

    def measures(self, config: TrainConfig) -> bool:
        """Whether a run has to measure its ``statistics`` first: no folder has them."""
        return False
