"""The field ``aside`` of a run's YAML: what the network is told of the picture itself."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from ldm.config.loader import config_class
from ldm.config.noise import ProcessConfig, ProcessSettings
from ldm.data.ranges import Share


@config_class
class LowResolutionSettings:
    """The same picture in small, noised: the network enlarges it.

    Args:
        factor: how many times smaller it is along each side.
        process: its noise; what is left out is that of ``model``, else of a cosine table of 1,000
            levels.
        levels: between which shares of these levels training draws one for each picture, which the
            network is told: [0, 1] all of them, [0, 0] the least noise alone.
    """

    kind: Literal["low_resolution"] = "low_resolution"
    factor: Annotated[int, Field(ge=2, le=64)] = 4
    process: ProcessConfig = field(default_factory=ProcessSettings)
    levels: tuple[Share, Share] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.levels[0] > self.levels[1]:
            raise ValueError(f"levels: {self.levels[0]} is more than {self.levels[1]}")
