"""The parts of a run: networks from folders or from random init, noise and objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.data.cached import CachedData
from ldm.data.images import ImageTransform
from ldm.diffusion import NoiseProcess, Objective
from ldm.engine.adapt import adapt
from ldm.engine.config import ConfigError, plain
from ldm.engine.networks import described, digest, in_model, initialised, on_meta, read
from ldm.engine.noise import process_and_objective, saved
from ldm.engine.schema import TrainConfig, UNetShape, VaeShape
from ldm.engine.text import make_text, read_tokenizer
from ldm.models.codec import Codec
from ldm.models.conditioner import ClipConditioner
from ldm.models.tokenizer import settings_of
from ldm.sampling import sampler


@dataclass
class Parts:
    """Everything a text-to-image run is made of; networks in float32.

    ``origin`` tells what was read from folders, by the keys of a run's identity.
    """

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer | None  # None on the meta device
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    process: NoiseProcess
    objective: Objective
    origin: dict[str, Any] = field(default_factory=dict)
    # The folder whose vae, text_encoder and tokenizer these are, where the two networks are shapes
    # alone, on the meta device.
    stored: Path | None = None

    def scheduler_config(self) -> dict[str, Any]:
        """What a saved folder says of noise and target."""
        learned = self.objective.learned_variance
        return self.process.scheduler_config(self.objective.target, learned_variance=learned)


def build(
    config: TrainConfig,
    captions: Sequence[str],
    *,
    meta: bool = False,
    held: CachedData | None = None,
) -> Parts:
    """All parts of ``config``.

    Args:
        config: the run.
        captions: what a tokenizer is trained on where the config describes one.
        meta: shapes only, on the meta device: no memory, and folders are read for configs alone.
        held: a cached set that autoencoder and text encoder are taken from, as shapes only.

    Raises:
        ConfigError: a part is described nowhere, cannot be read, or does not fit another.
    """
    if config.model and config.unet is None:
        in_model(config.model, "unet", "unet")  # before its scheduler is read
    process, objective = process_and_objective(config)
    if held is not None:
        vae = read_vae(str(held.folder / "vae"), meta=True)
        tokenizer = None if meta else read_tokenizer(held.folder / "tokenizer")
        text_encoder = read(CLIPTextModel, held.folder / "text_encoder", "data", True)
    else:
        vae, tokenizer, text_encoder = frozen_parts(config, captions, meta=meta)
    if tokenizer is not None:
        with described("text"):
            ClipConditioner(tokenizer, text_encoder)  # whether the two belong together
    unet = _unet(config, vae, text_encoder, process, objective, meta)
    origin = {}
    if not meta:
        frozen = held.made_with["origin"] if held else frozen_origin(vae, tokenizer, text_encoder)
        origin = _origin(config, {**frozen, "unet": digest(unet)})
    unet.register_to_config(sample_size=latent_side(vae, config.images))
    stored = held and held.folder
    parts = Parts(vae, tokenizer, text_encoder, unet, process, objective, origin, stored)
    for key in ("validation", "score"):
        drawing = getattr(config, key)
        # A validation without prompts draws nothing.
        if drawing is not None and getattr(drawing, "prompts", True):
            with described(key):
                sampler(drawing.sampler, parts.scheduler_config()).evaluations(drawing.steps)
    adapt(parts, config, meta=meta)
    return parts


def frozen_origin(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer | None, text_encoder: CLIPTextModel
) -> dict[str, str]:
    """Fingerprints of ``vae`` and of ``text``, the text encoder with its tokenizer."""
    beside = settings_of(tokenizer) if tokenizer else ""
    return {"vae": digest(vae), "text": digest(text_encoder, beside)}


def _origin(config: TrainConfig, prints: dict[str, str]) -> dict[str, Any]:
    """Those ``prints`` whose parts are read from folders, under ``model`` or the key that names
    the other folder.
    """
    found: dict[str, Any] = {}
    for key, fingerprint in prints.items():
        given = getattr(config, key)
        if given is None or isinstance(given, str):
            found[f"model.{key}" if given is None else f"{key}.folder"] = fingerprint
    if config.model and config.unet is None:
        process, target, learned = saved(config.model)
        noise = {"kind": process.kind, **plain(process)}
        found["model.scheduler"] = noise | {"target": plain(target), "learned_variance": learned}
    return found


def is_model(config: TrainConfig, parts: Parts) -> bool:
    """Whether the folder ``config.model`` is what a run starts from: every part of it, its noise
    and its target. A LoRA then needs no other base.
    """
    if config.model is None or config.vae or config.text or config.unet or config.text_layers:
        return False
    objective = parts.objective
    mine = (parts.process, objective.target, objective.learned_variance)
    return saved(config.model) == mine


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

    with described("vae"):
        if meta:
            return on_meta(make)
        with initialised(seed, "vae"):
            return make()


def read_vae(folder: str, *, meta: bool = False) -> AutoencoderKL:
    """The autoencoder of ``folder``, float32."""
    return read(AutoencoderKL, folder, "vae", meta)


def frozen_parts(
    config: TrainConfig, captions: Sequence[str], *, meta: bool = False
) -> tuple[AutoencoderKL, CLIPTokenizer | None, CLIPTextModel]:
    """Autoencoder, tokenizer and text encoder of ``config``; see ``build``."""
    return _vae(config, meta), *make_text(config, captions, meta=meta)


def _vae(config: TrainConfig, meta: bool) -> AutoencoderKL:
    if isinstance(config.vae, VaeShape):
        return make_vae(config.vae, config.seed, meta=meta)
    return read_vae(str(config.vae or in_model(config.model, "vae", "vae")), meta=meta)


def _unet(
    config: TrainConfig,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    process: NoiseProcess,
    objective: Objective,
    meta: bool,
) -> UNet2DConditionModel:
    width = text_encoder.config.hidden_size
    side = latent_side(vae, config.images)
    if config.unet is None:
        unet = read(UNet2DConditionModel, in_model(config.model, "unet", "unet"), "unet", meta)
        channels = vae.config.latent_channels
        returned = channels * (2 if objective.learned_variance else 1)
        if (unet.config.in_channels, unet.config.out_channels) != (channels, returned):
            told = f" of which a learned variance makes {returned}" if returned > channels else ""
            raise ConfigError(
                f"the U-Net of {config.model} takes {unet.config.in_channels} channels and returns"
                f" {unet.config.out_channels}, the autoencoder has {channels} latent channels{told}"
            )
        if unet.config.cross_attention_dim != width:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {unet.config.cross_attention_dim}, the text encoder writes {width}"
            )
        return unet

    def make() -> UNet2DConditionModel:
        unet = make_unet(
            config.unet,
            vae.config.latent_channels,
            width,
            side,
            learned_variance=objective.learned_variance,
        )
        if config.unet.time_embedding == "fourier":
            first, last = process.timestep(torch.tensor([0.0, 1.0], device="cpu")).tolist()
            turns = config.unet.fourier_scale or 16.0
            unet.time_proj.weight.data *= turns / (last - first)  # drawn from N(0, 1)
        return unet

    with described("unet"):
        if meta:
            return on_meta(make)
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


def make_unet(
    shape: UNetShape, channels: int, width: int, side: int, *, learned_variance: bool = False
) -> UNet2DConditionModel:
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
        out_channels=channels * (2 if learned_variance else 1),
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
        time_embedding_type=shape.time_embedding or "positional",
    )


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
