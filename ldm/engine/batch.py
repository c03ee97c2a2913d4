"""The global batch is the hyperparameter; how it is split over processes and in time follows."""

from __future__ import annotations

from ldm.config.schema import RunConfig
from ldm.errors import ConfigError


def split_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """Images per process and per micro-batch; ``ConfigError`` where they do not divide."""
    if config.batch_size % world:
        raise ConfigError(f"batch_size {config.batch_size} does not divide over {world} processes")
    share = config.batch_size // world
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"micro_batch_size {micro} does not divide the {share} images of each process"
            f" (batch_size {config.batch_size} over {world})"
        )
    return share, micro
