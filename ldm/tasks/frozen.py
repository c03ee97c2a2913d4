"""The parts of a run over a cached set: their shapes in memory, their files on disk.

A run that trains the U-Net alone on moments and embeddings needs of the autoencoder and the text
encoder only what their configs say. What a checkpoint needs of them are their files, which are
linked into it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.learning import CONTROLNET
from ldm.config.loader import plain
from ldm.config.schema import T5Shape, Text, TextShape, TrainConfig, VaeShape
from ldm.data.cached import CachedData
from ldm.encoding.cache_keys import reading
from ldm.errors import ConfigError
from ldm.families import Family, Tower, reads
from ldm.families.build import frozen_parts
from ldm.formats import open_clip
from ldm.models.clip import save_text_encoder
from ldm.models.strip_paths import strip_paths
from ldm.models.wrapped import bare
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.checkpoint import sha256
from ldm.storage.tensor_cache import fingerprint

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
    if any(part.startswith("text_encoder") for part in config.learns):
        raise ConfigError(
            f"train: {where}, in which captions are encoded: a text encoder"
            " that learns needs the data that it was made from"
        )
    if CONTROLNET in config.learns:
        raise ConfigError(
            f"train: {where}, which holds no hints: a ControlNet needs the data that it was made"
            " from"
        )
    if (family := reads.family(config)).picture_tower:
        raise ConfigError(
            f"family: {where}, which holds no embeddings of pictures: the family {family.name}"
            " needs the data that it was made from"
        )
    if config.vae == "pixels" or config.condition not in (None, "text"):
        raise ConfigError(f"vae, condition: {where} of latents and text: leave out both")
    if config.score:
        raise ConfigError(
            f"score: {where}, which holds no pictures to compare with: leave out score"
        )
    refuse_other(config, found[0])
    return found[0]


def of_texts(config: TrainConfig) -> str:
    """In which text encoders that do not learn are held."""
    return "float32" if config.frozen == "float32" else "bfloat16"


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
    if (was := made.get("frozen", "float32")) != of_texts(config):
        raise ConfigError(
            f"frozen: {where} made with {was!r}, and this config has {config.frozen!r}"
        )
    if (said := made.get("prompts")) != (now := reading(config)):
        raise ConfigError(
            f"prompt_syntax, prompt_windows: {where} whose captions were read as {said or 'text'},"
            f" and this config reads them as {now or 'text'}"
        )
    for part, asked in described(config).items():
        if asked is None or asked in (
            _without_null(made["described"].get(part)),
            _copied(held, part),
        ):
            continue
        folder = folder_of(config, part)
        if folder is None or _fingerprint(config, part) != made["fingerprints"].get(part):
            key = "vae" if part == "vae" else "text"
            what = {"vae": "autoencoder", "text_encoder": "text encoder"}.get(part, part)
            raise ConfigError(
                f"{key}: {where} made with another {what} than this config names"
                f" ({folder or 'a shape'}): leave out {key}, or make the set again"
            )


def _texts(config: TrainConfig) -> dict[str, tuple[Tower, Text | None]]:
    """By the folders of text encoders and tokenizers their tower, and what ``config`` says of
    it.
    """
    every = reads.texts(config, reads.family(config))
    return {name: (t, entry) for t, entry in every for name in (t.part, t.words)}


def described(config: TrainConfig) -> dict[str, Any]:
    """What ``config`` says of each frozen part, without loading any: the hashes of its files, or
    its shape and seed; None: nothing.
    """
    found: dict[str, Any] = {}
    said = {"vae": config.vae, **{part: entry for part, (_, entry) in _texts(config).items()}}
    for part, shape in said.items():
        folder = folder_of(config, part)
        if folder is not None:
            found[part] = {"files": _hashes(folder)}
            if part.startswith("text_encoder"):
                found[part]["layers"] = config.text_layers
        elif shape is None:
            found[part] = None
        else:
            found[part] = {"shape": plain(shape), "seed": config.seed}
    return {part: _without_null(told) for part, told in found.items()}


def _without_null(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description without the keys of a shape that are not set: later versions know more."""
    if told is None or "shape" not in told:
        return told
    return told | {"shape": {k: v for k, v in told["shape"].items() if v is not None}}


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
    if part == "vae":
        if not isinstance(config.vae, VaeShape):
            found = Path(config.vae) if config.vae else model and model / "vae"
    else:
        tower, entry = _texts(config)[part]
        if isinstance(entry, (TextShape, T5Shape)):
            if part == tower.words and entry.tokenizer:
                found = Path(entry.tokenizer)
        else:
            root = Path(entry) if entry else model
            alone = entry and open_clip.is_one(entry)
            found = root if alone else root and root / part
    if found is not None and not found.exists():
        raise ConfigError(f"{'vae' if part == 'vae' else 'text'}: {found} does not exist")
    return found


def _fingerprint(config: TrainConfig, part: str) -> str:
    """Of a part whose files are others: the numbers in them may be the same."""
    return fingerprints(reads.family(config), *frozen_parts(config, ()))[part]


def _copied(held: CachedData, part: str) -> dict[str, Any]:
    """How a config is described that names the set's own copy."""
    listed: dict[str, str] = held.manifest["sha256"]
    start = f"{part}/"
    files = {k.removeprefix(start): found for k, found in listed.items() if k.startswith(start)}
    return {"files": files} | ({"layers": None} if part.startswith("text_encoder") else {})


def fingerprints(
    family: Family, networks: Mapping[str, Any], tokenizers: Mapping[str, Any]
) -> dict[str, str]:
    """Of every frozen part."""
    found = {"vae": fingerprint(networks["vae"])}
    towers = family.conditioner(networks, tokenizers).towers
    for tower in family.present(networks):
        found[tower.part] = fingerprint(networks[tower.part])
        found[tower.words] = fingerprint(*towers[tower.part].printed)
    return found


def save_linked(pipe: LatentDiffusionPipeline, folder: Path, source: Path) -> None:
    """``pipe`` as a pipeline folder whose frozen parts are the files of ``source``: hard links, or
    copies where there can be none.
    """
    pipe.save_config(folder)
    for part in pipe.family.own:
        getattr(pipe, part).save_pretrained(folder / part)
    for tower in pipe.family.present(pipe.components):
        if not (source / tower.part).is_dir():  # it learns
            save_text_encoder(bare(getattr(pipe, tower.part)), folder / tower.part)
    strip_paths(folder)
    for part in (name for name in pipe.components if (source / name).is_dir()):
        (folder / part).mkdir()
        for file in sorted((source / part).iterdir()):
            try:
                os.link(file, folder / part / file.name)
            except OSError:  # on another disk, or a file system without links
                shutil.copyfile(file, folder / part / file.name)
