"""What the readers of single files can open: A1111 and ComfyUI know a model by shapes that were
published, and build the rest of it themselves.

ComfyUI finds its families by the width of the first layer, the width of the context, and what is
told beside it; takes the channels of every level for multiples of the first; and has one
autoencoder and fixed text encoders with CLIP's own tokenizer. A1111 has one config for each family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.formats.single.families import Configs, Kind

_VAE = {"sd3": 16, "flux": 16}
_CLIP_L = (768, 12)
_TOWERS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "sd1": {"text_encoder": (_CLIP_L,)},
    "sd2": {"text_encoder": ((1024, 23), (1024, 24))},
    "sdxl": {"text_encoder": (_CLIP_L,), "text_encoder_2": ((1280, 32),)},
    "sdxl-refiner": {"text_encoder_2": ((1280, 32),)},
    "sd3": {"text_encoder": (_CLIP_L,), "text_encoder_2": ((1280, 32),)},
    "flux": {"text_encoder": (_CLIP_L,)},
}
_WIDTHS = {
    "sd1": (320, 768),
    "sd2": (320, 1024),
    "sdxl": (320, 2048),
    "sdxl-refiner": (384, 1280),
}
_DEPTHS = {"sdxl": (1, 2, 10), "sdxl-refiner": (4, 4, 4, 4)}
_TOLD = {"sdxl": 2816, "sdxl-refiner": 2560}
_BETAS = ("scaled_linear", 0.00085, 0.012, 1000)
_PREDICTED = ("epsilon", "v_prediction")
_CLIP_WORDS = ("a</w>", 320)
"""A token of CLIP's vocabulary, and its number there."""

Difference = tuple[str, Any, Any]
"""What a reader asks for: a text with ``{}`` for the value, the value, and that of a model."""


def refused(kind: Kind, configs: Configs, words: Sequence[Mapping[str, int]]) -> str | None:
    """Why the readers of ``kind`` cannot open a model; None: they can.

    Args:
        kind: of its file.
        configs: of its networks, and of its scheduler.
        words: vocabularies of its CLIP tokenizers.
    """
    if kind.name not in _TOWERS:
        return "neither ComfyUI nor A1111 opens a model of this kind in one file"
    network = _unet if kind.name in _WIDTHS else _transformer
    for group in (network(kind.name, configs), _towers(kind.name, configs, words), _noise(configs)):
        found = [(text, asked, has) for text, asked, has in group if asked != has]
        if found:
            needed = ", ".join(text.format(_shown(asked)) for text, asked, _ in found)
            here = ", ".join(_shown(has) for *_, has in found)
            return f"{kind.readers} open {needed}: this has {here}"
    return None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unet(name: str, configs: Configs) -> Iterator[Difference]:
    unet, first = configs["unet"], _WIDTHS[name][0]
    channels = tuple(unet["block_out_channels"])
    has = channels[0], unet["cross_attention_dim"]
    yield from zip(("{} channels", "context {}"), _WIDTHS[name], has, strict=True)
    if has != _WIDTHS[name]:
        return
    rounded = tuple(max(first, width // first * first) for width in channels)
    yield "levels of {} channels, multiples of the first", rounded, channels
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    asked = (8,) * len(channels) if name == "sd1" else _of_64(channels)
    yield "{} heads", asked, _each(heads, len(channels))
    yield "{} numbers and pooled text", _TOLD.get(name), unet.get(_NUMBERS)
    depth = unet.get("transformer_layers_per_block", 1)
    asked = _DEPTHS.get(name, (1,) * len(channels))
    yield "{} transformer blocks a level", asked, _each(depth, len(channels))


_NUMBERS = "projection_class_embeddings_input_dim"


def _each(value: Any, levels: int) -> tuple[Any, ...]:
    """What a config says of every level, or of all."""
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _of_64(channels: Sequence[int]) -> tuple[int, ...]:
    return tuple(width // 64 for width in channels)


def _transformer(name: str, configs: Configs) -> Iterator[Difference]:
    has = configs["transformer"]
    if name == "flux":
        for text, key, asked in (
            ("{} heads", "num_attention_heads", 24),
            ("{} channels a head", "attention_head_dim", 128),
            ("text {} wide", "joint_attention_dim", 4096),
            ("pooled text {} wide", "pooled_projection_dim", 768),
            ("{} channels a token", "in_channels", 64),
        ):
            yield text, asked, has[key]
        return
    yield "as many heads as layers ({})", has["num_layers"], has["num_attention_heads"]
    yield "{} channels a head", 64, has["attention_head_dim"]
    yield "text {} wide", 4096, has["joint_attention_dim"]
    yield "pooled text {} wide", 2048, has["pooled_projection_dim"]
    yield "{} latent channels", 16, has["in_channels"]


def _towers(
    name: str, configs: Configs, words: Sequence[Mapping[str, int]]
) -> Iterator[Difference]:
    if (vae := configs.get("vae")) is not None:
        yield "an autoencoder of {}", (128, 256, 512, 512), tuple(vae["block_out_channels"])
        yield "{} layers a level in it", 2, vae["layers_per_block"]
        yield "{} latent channels", _VAE.get(name, 4), vae["latent_channels"]
    for part, asked in _TOWERS[name].items():
        if (tower := configs.get(part)) is None:
            continue
        size = tower["hidden_size"], tower["num_hidden_layers"]
        yield "a text encoder of width and layers {}", size if size in asked else asked[0], size
        yield "{} tokens a text", 77, tower["max_position_embeddings"]
        yield "a vocabulary of {}", 49408, tower["vocab_size"]
    for known in words:
        token, number = _CLIP_WORDS
        yield "CLIP's own tokenizer (a token {})", (token, number), (token, known.get(token))


def _noise(configs: Configs) -> Iterator[Difference]:
    scheduler = configs.get("scheduler", {})
    if scheduler.get("_class_name", "").startswith("Flow"):
        return
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    defaults = ("linear", 0.0001, 0.02, 1000)  # of schedulers that say nothing
    has = tuple(scheduler.get(key, value) for key, value in zip(keys, defaults, strict=True))
    yield "noise of betas {}", _BETAS, has
    predicts = scheduler.get("prediction_type", "epsilon")
    yield "a prediction of {}", predicts if predicts in _PREDICTED else _PREDICTED, predicts
