"""What the U-Net of a run reads: latents or pixels; and text, the label of a class, or nothing.

A config says so, or else the folder that it starts from; without either it is latents and text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config.schema import Classes, TrainConfig
from ldm.errors import ConfigError
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
        if (index.get("text_encoder") or [None])[0] is None:
            return tuple(index.get("classes") or ())
    return () if asked == "none" else None


def refuse(config: TrainConfig) -> None:
    """``ConfigError`` for what needs text, or an autoencoder, in a run that has none."""
    if classes(config) is None:
        return
    told = "a U-Net without text (condition)"
    for key in ("text", "text_layers", "lora", "textual_inversion", "score"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}: {told} has no place for it: leave it out")
    if "text_encoder" in config.learns:
        raise ConfigError(f"train: {told} has no text encoder that could learn: leave it out")
    shape = config.unet
    if shape and (shape.use_linear_projection or isinstance(shape.attention_head_dim, tuple)):
        key = "attention_head_dim" if not shape.use_linear_projection else "use_linear_projection"
        raise ConfigError(f"unet.{key}: {told} has no transformers: leave it out, or give a number")
