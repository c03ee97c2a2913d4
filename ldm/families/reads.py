"""What the U-Net of a run reads: latents or pixels; and text, the label of a class, or nothing.

A config says so, or else the folder that it starts from; without either it is latents and text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config.schema import Classes, T5Shape, Text, TextShape, TrainConfig
from ldm.errors import ConfigError
from ldm.families import FAMILIES, Family, Tower
from ldm.families.model import Model
from ldm.formats.integrity import json_object


def _index(config: TrainConfig) -> dict[str, Any] | None:
    """``model_index.json`` of the folder that ``config`` starts from, if it can be read."""
    if config.model is None:
        return None
    try:
        return json_object(Path(config.model) / "model_index.json")
    except (OSError, ValueError):  # ``in_model`` tells, where a part is asked for
        return None


def settings(folder: Path) -> dict[str, Any]:
    """``config.json`` of ``folder``, empty where it cannot be read: who opens the folder tells."""
    try:
        return json_object(folder / "config.json")
    except (OSError, ValueError):
        return {}


def pixels(config: TrainConfig) -> bool:
    """Whether pictures are their own latents."""
    if config.vae is not None:
        return config.vae == "pixels"
    index = _index(config)
    return index is not None and (index.get("vae") or [None])[0] is None


def classes(config: TrainConfig) -> tuple[str, ...] | None:
    """Names of the classes whose labels are read: none at all of an unconditional model; None
    where it is text that is read.
    """
    asked = config.condition
    if isinstance(asked, Classes):
        return asked.classes
    if asked is None and config.text is None and (index := _index(config)) is not None:
        towers = (value for name, value in index.items() if name.startswith("text_encoder"))
        if not any(_is_part(value) and value[0] for value in towers):
            return tuple(index.get("classes") or ())
    return () if asked == "none" else None


def family(config: TrainConfig) -> Family:
    """The family of the model: that of the folder it starts from, or what ``family`` says, or the
    first that fits.

    Raises:
        ConfigError: these contradict each other.
    """
    if config.family is not None and config.family not in FAMILIES:
        raise ConfigError(
            f"family: {config.family!r} is none of {', '.join(sorted(FAMILIES))}; each is a file in"
            " ldm/families"
        )
    asked = FAMILIES[config.family] if config.family else None
    if classes(config) is not None:
        found: Family | None = FAMILIES["pixels"]
    else:
        found = _of_index(_index(config)) or asked or FAMILIES["sd"]
    if asked and asked.grows_from == found.name:
        found = asked
    if asked and asked is not found:
        raise ConfigError(
            f"family: {asked.name} is asked for, and"
            f" {config.model or 'what condition says'} is of the family {found.name}"
        )
    for other in sorted({"unet", "transformer", "prior"} - {found.network}):
        if getattr(config, other) is not None:
            raise ConfigError(
                f"{other}: a model of the family {found.name} has none, but a {found.network}:"
                " describe that, or name another family"
            )
    if config.image_encoder is not None and not found.picture_tower:
        raise ConfigError(
            f"image_encoder: a model of the family {found.name} has no picture tower: leave it out"
        )
    if config.vae is not None and found.embeds:
        raise ConfigError(
            f"vae: the latents of the family {found.name} are embeddings: leave it out"
        )
    return found


def _of_index(index: dict[str, Any] | None) -> Family | None:
    """The family of a folder with text."""
    if index is None:
        return None
    parts = {name: value[0] for name, value in index.items() if _is_part(value)}
    every = [family for family in FAMILIES.values() if family.towers]
    known = (family for family in every if index.get("_class_name") in family.stock)
    return next(known, None) or next((family for family in every if family.fits(parts)), None)


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def learns(config: TrainConfig, model: Model) -> tuple[str, ...]:
    """Folders of the networks in which something learns; "unet" in ``train`` is the network that
    predicts, whatever its family calls it, and a new word is one of all text encoders.
    """
    family = model.family
    if config.textual_inversion is not None:
        return tuple(tower.part for tower in family.present(model.networks))
    return tuple(family.network if part == "unet" else part for part in config.learns)


def zeros(config: TrainConfig, family: Family) -> bool:
    """Whether no text is zeros to the network: as the folder says that it is taken from, else as
    the family does.
    """
    index = (_index(config) if config.network is None else None) or {}
    said = index.get("force_zeros_for_empty_prompt")
    return family.zeros if said is None else said


def texts(config: TrainConfig, family: Family) -> list[tuple[Tower, Text]]:
    """The towers that the model has, each with what ``text`` says of it; those that ``text``, or
    else the folder that the model starts from, has no entry for are absent.

    Raises:
        ConfigError: ``text`` has another number of entries than the family has towers.
    """
    if not family.towers:
        return []
    entries: tuple[Any, ...] = (config.text,) * len(family.towers)
    if isinstance(config.text, tuple):
        entries = config.text
    elif isinstance(config.text, (TextShape, T5Shape)) and len(family.towers) > 1:
        entries = (config.text,)
    if len(entries) != len(family.towers):
        raise ConfigError(
            f"text: {len(entries)} entries, and the family {family.name} has"
            f" {len(family.towers)} text encoders: give one for each, in the order"
            f" {', '.join(tower.part for tower in family.towers)}"
        )
    absent = [entry is None for entry in entries]
    if config.text is None:
        index = _index(config) or {}
        absent = [(index.get(tower.part) or [""])[0] is None for tower in family.towers]
    every = zip(family.towers, entries, absent, strict=True)
    return [(tower, entry) for tower, entry, gone in every if not gone]


def refuse(config: TrainConfig) -> None:
    """``ConfigError`` for what needs text, or an autoencoder, in a run that has none."""
    if classes(config) is None:
        return
    told = "a U-Net without text (condition)"
    for key in ("text", "text_layers", "lora", "textual_inversion", "score"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}: {told} has no place for it: leave it out")
    if any(part.startswith("text_encoder") for part in config.learns):
        raise ConfigError(f"train: {told} has no text encoder that could learn: leave it out")
    shape = config.unet
    for key, wrong in (
        ("use_linear_projection", shape and shape.use_linear_projection),
        ("attention_head_dim", shape and isinstance(shape.attention_head_dim, tuple)),
        ("transformer_layers", shape and shape.transformer_layers != 1),
    ):
        if wrong:
            raise ConfigError(
                f"unet.{key}: {told} has no transformers: leave it out, or give a number"
            )
