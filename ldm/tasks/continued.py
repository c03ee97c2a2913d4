"""The model of a run that goes on from a LoRA: its file is needed at the run's start alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.config.schema import TrainConfig
from ldm.data.cached import CachedData
from ldm.engine import counters
from ldm.families import build as families
from ldm.families.continued import KEY
from ldm.families.model import Model
from ldm.storage import checkpoint


def build(
    config: TrainConfig,
    captions: Sequence[str],
    *,
    meta: bool = False,
    held: CachedData | None = None,
) -> Model:
    """The model that ``config`` describes, see ``ldm.families.build``.

    Where ``lora.file`` is gone and the run has begun, its newest checkpoint says what was in it:
    the LoRA there has the same shapes, and weights that the checkpoint's own replace.

    Raises:
        ConfigError: as there.
    """
    settings, begun = config.lora, None
    if settings and settings.file and not Path(settings.file).exists():
        begun = _begun(Path(config.run))
    if not settings or begun is None:
        return families.build(config, captions, meta=meta, held=held)
    folder, fingerprint = begun
    there = replace(config, lora=replace(settings, file=str(folder)))
    model = families.build(there, captions, meta=meta, held=held)
    model.origin[KEY] = fingerprint
    return model


def _begun(run: Path) -> tuple[Path, str] | None:
    """The newest checkpoint of a run that went on from a LoRA, and the fingerprint of that."""
    folder = checkpoint.newest(run / "checkpoints")
    kept = {} if folder is None else counters.read(folder / "training")["identity"]
    return (folder, json.loads(kept[KEY])) if folder and KEY in kept else None
