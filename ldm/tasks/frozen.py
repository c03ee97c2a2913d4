"""The parts of a run over a cached set: their shapes in memory, their files on disk.

A run that trains the U-Net alone on moments and embeddings needs of the autoencoder and the text
encoder only what their configs say. What a checkpoint needs of them are their files, which are
linked into it.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from ldm.config.loader import plain
from ldm.config.schema import TextShape, TrainConfig, VaeShape
from ldm.data.cached import PARTS, CachedData
from ldm.errors import ConfigError
from ldm.families.networks import read
from ldm.families.parts import frozen_parts, read_vae
from ldm.formats import open_clip
from ldm.models.conditioner import ClipConditioner
from ldm.models.strip_paths import forget_origin
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.checkpoint import sha256
from ldm.storage.tensor_cache import fingerprint

log = logging.getLogger(__name__)

_FILES = {".json", ".safetensors", ".txt", ".bin", ".pt"}  # of a part


def cached_set(config: TrainConfig) -> CachedData | None:
    """The cached set that ``config`` trains from, if it does.

    Raises:
        ConfigError: the config asks for what a set cannot give.
        DataError: the set is not complete.
    """
    data = config.data if isinstance(config.data, tuple) else (config.data,)
    found = [part for part in data if isinstance(part, CachedData)]
    if not found:
        return None
    where = f"{found[0].name} is a cached set"
    if len(data) > 1:
        raise ConfigError(
            f"data: {where}, which is all of a run's data: cache the sources together"
        )
    if "text_encoder" in config.learns:
        raise ConfigError(
            f"train: {where}, in which captions are encoded: a text encoder"
            " that learns needs the data that it was made from"
        )
    if config.vae == "pixels" or config.condition not in (None, "text"):
        raise ConfigError(f"vae, condition: {where} of latents and text: leave out both")
    if config.score:
        raise ConfigError(
            f"score: {where}, which holds no pictures to compare with: leave out score"
        )
    refuse_other(config, found[0])
    return found[0]


def refuse_other(config: TrainConfig, held: CachedData) -> None:
    """``ConfigError`` naming the first thing that ``held`` was made with and that is another in
    ``config``.
    """
    _ = held.manifest  # whether it is complete
    made, where = held.made_with, f"{held.name} is a cached set"
    for key, now in plain(config.images).items():
        if (was := made["images"].get(key)) != now:
            raise ConfigError(
                f"images.{key}: {where} made with {was!r}, and this config has {now!r}"
            )
    for part, asked in described(config).items():
        if asked is None or asked == made["described"].get(part) or asked == _copied(held, part):
            continue
        folder = folder_of(config, part)
        if folder is None or _fingerprint(config, part) != made["fingerprints"].get(part):
            key = "vae" if part == "vae" else "text"
            what = {"vae": "autoencoder", "text_encoder": "text encoder"}.get(part, part)
            raise ConfigError(
                f"{key}: {where} made with another {what} than this config names"
                f" ({folder or 'a shape'}): leave out {key}, or make the set again"
            )


def described(config: TrainConfig) -> dict[str, Any]:
    """What ``config`` says of each frozen part, without loading any: the hashes of its files, or
    its shape and seed; None: nothing.
    """
    found: dict[str, Any] = {}
    for part in PARTS:
        shape = config.vae if part == "vae" else config.text
        folder = folder_of(config, part)
        if folder is not None:
            found[part] = {"files": _hashes(folder)}
            if part == "text_encoder":
                found[part]["layers"] = config.text_layers
        elif shape is None:
            found[part] = None
        else:
            found[part] = {"shape": plain(shape), "seed": config.seed}
    return found


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files of a part; an open_clip tower may be a single one."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return {f.name: sha256(f) for f in files if f.suffix in _FILES and f.is_file()}


def folder_of(config: TrainConfig, part: str) -> Path | None:
    """The folder that ``config`` takes ``part`` from, None if it describes it or says nothing.

    Raises:
        ConfigError: there is no such folder.
    """
    found: Path | None = None
    model = Path(config.model) if config.model else None
    if part == "vae" and not isinstance(config.vae, VaeShape):
        found = Path(config.vae) if config.vae else model and model / "vae"
    elif part != "vae" and not isinstance(config.text, TextShape):
        root = Path(config.text) if config.text else model
        tower = config.text and open_clip.is_one(config.text)
        found = root if tower else root and root / part
    elif part == "tokenizer" and isinstance(config.text, TextShape) and config.text.tokenizer:
        found = Path(config.text.tokenizer)
    if found is not None and not found.exists():
        raise ConfigError(f"{'vae' if part == 'vae' else 'text'}: {found} does not exist")
    return found


def _fingerprint(config: TrainConfig, part: str) -> str:
    """Of a part whose files are others: the numbers in them may be the same."""
    vae, tokenizer, text_encoder = frozen_parts(config, ())
    assert tokenizer is not None
    return fingerprints(vae, ClipConditioner(tokenizer, text_encoder))[part]


def _copied(held: CachedData, part: str) -> dict[str, Any]:
    """How a config is described that names the set's own copy."""
    listed: dict[str, str] = held.manifest["sha256"]
    start = f"{part}/"
    files = {k.removeprefix(start): found for k, found in listed.items() if k.startswith(start)}
    return {"files": files} | ({"layers": None} if part == "text_encoder" else {})


def fingerprints(vae: AutoencoderKL, conditioner: ClipConditioner) -> dict[str, str]:
    """Of every frozen part."""
    return {
        "vae": fingerprint(vae),
        "text_encoder": fingerprint(conditioner.text_encoder),
        "tokenizer": fingerprint(*conditioner.printed),
    }


def save_linked(pipe: LatentDiffusionPipeline, folder: Path, source: Path) -> None:
    """``pipe`` as a pipeline folder whose frozen parts are the files of ``source``: hard links, or
    copies where there can be none.
    """
    pipe.save_config(folder)
    pipe.unet.save_pretrained(folder / "unet")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    forget_origin(folder)
    for part in PARTS:
        (folder / part).mkdir()
        for file in sorted((source / part).iterdir()):
            try:
                os.link(file, folder / part / file.name)
            except OSError:  # on another disk, or a file system without links
                shutil.copyfile(file, folder / part / file.name)


def loaded(pipe: LatentDiffusionPipeline, source: Path, what: str) -> LatentDiffusionPipeline:
    """``pipe`` with the frozen parts of ``source`` in memory, where its U-Net is; ``what`` asks for
    them.
    """
    log.info("%s: the autoencoder and the text encoder are loaded from %s for it", what, source)
    whole = LatentDiffusionPipeline(
        read_vae(str(source / "vae")),
        read(CLIPTextModel, source / "text_encoder", "data", False),
        pipe.tokenizer,
        pipe.unet,
        pipe.scheduler,
    )
    return whole.to(pipe.unet.device)
