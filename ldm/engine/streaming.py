"""Runs over data that is streamed: what they can do, and what holds for them."""

from __future__ import annotations

import logging
from pathlib import Path

from ldm.config.loader import images
from ldm.config.schema import RunConfig, TextShape, TrainConfig
from ldm.data.hub import DatasetsData
from ldm.data.stream import StreamCollection
from ldm.errors import ConfigError

log = logging.getLogger(__name__)


def streamed(config: RunConfig, processes: int = 1) -> StreamCollection | None:
    """The data of ``config`` if it is a stream, else None; says what does not hold for a stream.

    Args:
        config: the run.
        processes: of the run.

    Raises:
        ConfigError: naming what cannot be done with a stream.
        DataError: it cannot be opened.
    """
    sources = config.data if isinstance(config.data, tuple) else (config.data,)
    data = next((s for s in sources if isinstance(s, DatasetsData) and s.streaming), None)
    if data is None:
        return None
    if refused := _refused(config, len(sources)):
        raise ConfigError(f"data.streaming: {refused}, or leave out data.streaming")
    durations = [config.duration, config.optimizer.warmup, config.checkpoints.every]
    durations += config.ema.half_lives if config.ema else []
    durations += [config.optimizer.cooldown] if config.optimizer.cooldown else []
    durations += [config.validation.every] if config.validation else []
    for duration in durations:
        images(duration, config.batch_size, None)
    held_out = config.validation.images if config.validation else 0
    found = StreamCollection(
        data, config.images, config.on_bad_sample,
        batch=config.batch_size, seed=config.seed, run=Path(config.run), held_out=held_out,
    )  # fmt: skip
    log.info(
        "data: %s is streamed, outside the promise of exact resume: nothing is hashed ahead; each"
        " of %d lanes goes on from its notes in %s, to the same pictures as long as the %d files"
        " stay the same",
        data.path, found.lanes, found.notes.parent, len(found.files),
    )  # fmt: skip
    if found.lanes % processes:
        log.warning(
            "%d processes do not divide the %d lanes, so some files are read by several of them:"
            " set data.streaming.lanes (at most as many as there are files)",
            processes, found.lanes,
        )  # fmt: skip
    return found


def _refused(config: RunConfig, sources: int) -> str:
    """What does not go with a stream, and what to do; "" if all does."""
    if not isinstance(config, TrainConfig):
        return "only the text-to-image model is trained on a stream"
    if sources > 1:
        return "a stream is mixed with no other source; name it alone"
    if config.images.buckets:
        return "the sizes of its pictures are not known ahead; leave out images.buckets"
    if config.order.window:
        return "its order is that of its lanes; leave out order.window"
    if config.textual_inversion:
        return "its captions cannot be searched for a new word; leave out textual_inversion"
    if config.score:
        return "a score compares with all pictures; leave out score"
    if config.workers != "auto" and config.workers > 1:
        return "a process reads it with a thread for each lane; set workers to 0 or 1"
    if isinstance(config.text, TextShape) and config.text.tokenizer is None:
        return "no tokenizer is trained on it; give text.tokenizer"
    return ""
