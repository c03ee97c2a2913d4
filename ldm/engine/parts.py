"""The networks of a run, each from a folder or from random init.

Random init happens inside ``fork_rng`` with a seed of its own per component, so that no part's
weights depend on which others were built before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.data.images import ImageTransform
from ldm.diffusion import TARGET_OF_PREDICTION_TYPE, NoiseProcess, Objective, Target, stream
from ldm.engine.config import ConfigError
from ldm.engine.schema import TextShape, TrainConfig, UNetShape, VaeShape
from ldm.models.codec import Codec
from ldm.models.conditioner import ClipConditioner
from ldm.models.lora import attach
from ldm.models.tokenizer import train_tokenizer
from ldm.sampling import sampler

M = TypeVar("M")


@dataclass
class Parts:
    """Everything a text-to-image run is made of; networks in float32."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer | None  # None on the meta device
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    process: NoiseProcess
    objective: Objective


@contextmanager
def initialised(seed: int, component: str) -> Iterator[None]:
    """Random init of ``component`` from its own seed; the global generator comes back unmoved."""
    with torch.random.fork_rng():
        torch.manual_seed(int(stream(seed, f"init {component}").integers(2**63)))
        yield


@contextmanager
def _described(key: str) -> Iterator[None]:
    """What a network says of numbers that do not fit each other, as an error of the config."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{key}: {message}") from None


def build(config: TrainConfig, captions: Sequence[str], *, meta: bool = False) -> Parts:
    """All parts of ``config``.

    Args:
        config: the run.
        captions: what a tokenizer is trained on where the config describes one.
        meta: shapes only, on the meta device: no memory, and folders are read for configs alone.

    Raises:
        ConfigError: a part is described nowhere, cannot be read, or does not fit another.
    """
    vae = _vae(config, meta)
    tokenizer, text_encoder = _text(config, captions, meta)
    if tokenizer is not None:
        with _described("text"):
            ClipConditioner(tokenizer, text_encoder)  # whether the two belong together
    unet = _unet(config, vae, text_encoder, meta)
    process, objective = process_and_objective(config)
    unet.register_to_config(sample_size=latent_side(vae, config.images))
    try:
        process.refuse(objective.target)
        # What a checkpoint will say, and what will draw from it.
        scheduler = process.scheduler_config(objective.target)
        for key in ("validation", "score"):
            if (drawing := getattr(config, key)) is not None:
                with _described(key):
                    sampler(drawing.sampler, scheduler).start(drawing.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parts = Parts(vae, tokenizer, text_encoder, unet, process, objective)
    if config.lora is not None:
        _adapt(parts, config, meta)
    return parts


def _adapt(parts: Parts, config: TrainConfig, meta: bool) -> None:
    """Adapters in every part that learns, each part's from its own seed."""
    lora = config.lora
    assert lora is not None
    for part, key in (("unet", "targets"), ("text_encoder", "text_targets")):
        if part not in config.train:
            continue

        def make(part: str = part, key: str = key) -> None:
            alpha = float(lora.rank) if lora.alpha is None else lora.alpha
            attach(
                getattr(parts, part),
                getattr(lora, key),
                rank=lora.rank,
                alpha=alpha,
                dora=lora.dora,
            )

        with _described(f"lora.{key}"):
            if meta:
                _on_meta(make)
            else:
                with initialised(config.seed, f"lora {part}"):
                    make()


def is_model(config: TrainConfig, parts: Parts) -> bool:
    """Whether the folder ``config.model`` is what a run starts from: every part of it, its noise
    and its target. A LoRA then needs no other base.
    """
    if config.model is None or config.vae or config.text or config.unet:
        return False
    return _saved_process(config.model) == (parts.process, parts.objective.target)


def process_and_objective(config: TrainConfig) -> tuple[NoiseProcess, Objective]:
    """Those of the config; what it leaves open comes from the model folder, else the defaults."""
    process, target = NoiseProcess(), "eps"
    if config.model and config.unet is None:
        process, target = _saved_process(config.model)
    try:
        return (
            replace(process, **_given(config.process)),
            Objective(**{"target": target, **_given(config.objective)}),
        )
    except ValueError as error:
        raise ConfigError(f"process: {error}") from None


def _given(settings: Any) -> dict[str, Any]:
    """The fields that a config sets."""
    return {k: v for k, v in vars(settings).items() if v is not None}


def _saved_process(model: str) -> tuple[NoiseProcess, Target]:
    file = Path(model) / "scheduler" / "scheduler_config.json"
    try:
        saved = json.loads(file.read_text())
        if not isinstance(saved, dict):
            raise ValueError("it is no JSON object")
        speaks = saved.get("prediction_type", "epsilon")
        if speaks not in TARGET_OF_PREDICTION_TYPE:
            raise ValueError(f"prediction_type {speaks!r} is not supported")
        process = NoiseProcess.from_scheduler(saved)
        len(process.table.alpha)  # whether its numbers are some
        return process, TARGET_OF_PREDICTION_TYPE[speaks]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model: {file} cannot be used: {error}") from None


def _read(cls: type[M], folder: str | Path, key: str, meta: bool) -> M:
    """A network of ``folder``, or its shape alone."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no {cls.__name__} (it has no config.json)")
    if meta:
        if cls is CLIPTextModel:
            return _on_meta(lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(folder)))
        return _on_meta(lambda: cls.from_config(cls.load_config(folder)))  # type: ignore[attr-defined]
    named = "dtype" if cls is CLIPTextModel else "torch_dtype"
    try:
        network, found = cls.from_pretrained(  # type: ignore[attr-defined]
            folder, use_safetensors=True, output_loading_info=True, **{named: torch.float32}
        )
        if missing := sorted(found["missing_keys"]):  # they would be random, or not there
            raise ValueError(f"they lack {len(missing)} tensors, {missing[0]} for one")
        return network
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{key}: the weights in {folder} cannot be read: {line}") from None


def _on_meta(make):  # noqa: ANN001, ANN202
    with torch.device("meta"):
        return make()


def _from(config: TrainConfig, key: str, subfolder: str) -> Path:
    if config.model is None:
        raise ConfigError(f"{key} is not described: give {key}, or model, a pipeline folder")
    if not (Path(config.model) / "model_index.json").is_file():
        raise ConfigError(
            f"model: {config.model} is no pipeline folder (it has no model_index.json)"
        )
    return Path(config.model) / subfolder


def make_vae(shape: VaeShape, seed: int, *, meta: bool = False) -> AutoencoderKL:
    """An autoencoder of ``shape`` from random init."""
    levels = len(shape.block_out_channels)

    def make() -> AutoencoderKL:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
            block_out_channels=shape.block_out_channels,  # type: ignore[arg-type]
            layers_per_block=shape.layers_per_block,
            latent_channels=shape.latent_channels,
            norm_num_groups=shape.norm_num_groups,
            mid_block_add_attention=shape.mid_attention,
            scaling_factor=1.0,
        )

    with _described("vae"):
        if meta:
            return _on_meta(make)
        with initialised(seed, "vae"):
            return make()


def read_vae(folder: str, *, meta: bool = False) -> AutoencoderKL:
    """The autoencoder of ``folder``, float32."""
    return _read(AutoencoderKL, folder, "vae", meta)


def _vae(config: TrainConfig, meta: bool) -> AutoencoderKL:
    if isinstance(config.vae, VaeShape):
        return make_vae(config.vae, config.seed, meta=meta)
    return read_vae(str(config.vae or _from(config, "vae", "vae")), meta=meta)


def _text(
    config: TrainConfig, captions: Sequence[str], meta: bool
) -> tuple[CLIPTokenizer | None, CLIPTextModel]:
    shape = config.text
    if not isinstance(shape, TextShape):
        root = Path(shape) if shape else _from(config, "text", "")
        tokenizer = None if meta else _tokenizer(root / "tokenizer")
        return tokenizer, _read(CLIPTextModel, root / "text_encoder", "text", meta)
    with _described("text"):
        text_config = CLIPTextConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.max_length,
            hidden_act=shape.activation,
        )
    if meta:
        return None, _on_meta(lambda: CLIPTextModel(text_config))
    tokenizer = (
        _tokenizer(Path(shape.tokenizer))
        if shape.tokenizer
        else train_tokenizer(captions, shape.vocab_size, shape.max_length)
    )
    # A tokenizer trained on few captions has fewer tokens than asked for.
    text_config.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, token, getattr(tokenizer, token))
    with initialised(config.seed, "text_encoder"):
        return tokenizer, CLIPTextModel(text_config)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    there = [name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
    if not there or not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"text: {folder} is no folder of a tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises no class of its own
        line = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"text: {folder} cannot be read: {line}") from None


def _unet(
    config: TrainConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel, meta: bool
) -> UNet2DConditionModel:
    width = text_encoder.config.hidden_size
    side = latent_side(vae, config.images)
    if config.unet is None:
        unet = _read(UNet2DConditionModel, _from(config, "unet", "unet"), "unet", meta)
        channels = vae.config.latent_channels
        if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
            raise ConfigError(
                f"the U-Net of {config.model} takes {unet.config.in_channels} channels and returns"
                f" {unet.config.out_channels}, the autoencoder has {channels} latent channels"
            )
        if unet.config.cross_attention_dim != width:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {unet.config.cross_attention_dim}, the text encoder writes {width}"
            )
        return unet

    def make() -> UNet2DConditionModel:
        return make_unet(config.unet, vae.config.latent_channels, width, side)

    with _described("unet"):
        if meta:
            return _on_meta(make)
        with initialised(config.seed, "unet"):
            return make()


def latent_side(vae: AutoencoderKL, images: ImageTransform) -> int:
    """Side of the latent of a square picture; ``ConfigError`` if that of any shape is not whole."""
    factor = Codec(vae).factor
    key, value = ("buckets.step", images.buckets.step) if images.buckets else ("size", images.size)
    if value % factor:
        raise ConfigError(
            f"images.{key} {value} is no multiple of {factor}, the pixels of a latent"
        )
    return images.size // factor


def make_unet(shape: UNetShape, channels: int, width: int, side: int) -> UNet2DConditionModel:
    """A U-Net of ``shape`` for latents of ``channels`` and ``side``, tokens of ``width``."""
    levels = len(shape.block_out_channels)
    attention = shape.attention or (True,) * (levels - 1) + (False,)
    if len(attention) != levels:
        raise ConfigError(
            f"unet.attention has {len(attention)} entries for {levels} block_out_channels"
        )
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=shape.block_out_channels,  # type: ignore[arg-type]
        layers_per_block=shape.layers_per_block,
        down_block_types=tuple(  # type: ignore[arg-type]
            "CrossAttnDownBlock2D" if with_text else "DownBlock2D" for with_text in attention
        ),
        up_block_types=tuple(  # type: ignore[arg-type]
            "CrossAttnUpBlock2D" if with_text else "UpBlock2D" for with_text in reversed(attention)
        ),
        attention_head_dim=shape.attention_head_dim,  # type: ignore[arg-type]
        cross_attention_dim=width,
        norm_num_groups=shape.norm_num_groups,
        use_linear_projection=shape.use_linear_projection,
    )


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
