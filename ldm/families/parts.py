"""The parts of a run: networks from folders or from random init, noise and objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.config.loader import plain
from ldm.config.schema import TrainConfig, UNetShape, VaeShape
from ldm.data.cached import CachedData
from ldm.data.images import ImageTransform
from ldm.errors import ConfigError
from ldm.families import reads
from ldm.families.adapt import adapt
from ldm.families.model import Parts, given
from ldm.families.networks import described, digest, in_model, initialised, on_meta, read
from ldm.families.noise import process_and_objective, saved
from ldm.families.text import make_text, read_tokenizer
from ldm.models.codec import codec_of
from ldm.models.tokenizer import settings_of
from ldm.sampling import sampler
from ldm.sampling.defaults import stated_by


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
    reads.refuse(config)
    if config.model and config.unet is None:
        in_model(config.model, "unet", "unet")  # before its scheduler is read
    process, objective = process_and_objective(config)
    if held is not None:
        vae = read_vae(str(held.folder / "vae"), meta=True)
        tokenizer = None if meta else read_tokenizer(held.folder / "tokenizer")
        text_encoder = read(CLIPTextModel, held.folder / "text_encoder", "data", True)
    else:
        vae, tokenizer, text_encoder = frozen_parts(config, captions, meta=meta)
    classes = reads.classes(config)
    parts = Parts(vae, tokenizer, text_encoder, None, process, objective, classes=classes)
    with described("text" if classes is None else "condition"):
        if classes is not None or tokenizer is not None:
            _ = parts.conditioner  # whether tokenizer and text encoder belong together
    parts.unet = unet = _unet(config, parts, meta)
    if not meta:
        frozen = held.made_with["origin"] if held else frozen_origin(vae, tokenizer, text_encoder)
        parts.origin = _origin(config, {**frozen, "unet": digest(unet)})
    unet.register_to_config(sample_size=latent_side(vae, config.images))
    parts.stored = held and held.folder
    with described("model"):
        parts.stated = stated_by(config.model) if config.model and config.unet is None else {}
    if not _runs(parts.stated.get("sampler"), parts):  # the run has another process
        del parts.stated["sampler"]
    parts.sampling = parts.stated.copy()
    for drawing in (config.score, config.validation):  # the latter, where both say something
        parts.sampling |= given(drawing) if drawing else {}
    for key in ("validation", "score"):
        drawing = getattr(config, key)
        # A validation without prompts, captions or suites draws nothing.
        asked = (getattr(drawing, what, True) for what in ("prompts", "captions", "suites"))
        if drawing is not None and any(asked):
            with described(key):
                how = parts.drawn_with(drawing)
                sampler(how.sampler, parts.scheduler_config()).evaluations(how.num_inference_steps)
    if classes is not None and config.validation:
        with described("validation.prompts"):
            parts.conditioner.tokenize(config.validation.prompts)
            if not classes and any(config.validation.prompts):
                raise ValueError("this model is unconditional: it reads no prompt but ''")
    adapt(parts, config, meta=meta)
    return parts


def _runs(name: str | None, parts: Parts) -> bool:
    """Whether the named sampler, if there is one, runs the process of ``parts``."""
    try:
        if name is not None:
            sampler(name, parts.scheduler_config())
    except ValueError:
        return False
    return True


def frozen_origin(
    vae: AutoencoderKL | None, tokenizer: CLIPTokenizer | None, text_encoder: CLIPTextModel | None
) -> dict[str, str]:
    """Fingerprints of ``vae`` and of ``text``, the text encoder with its tokenizer."""
    beside = settings_of(tokenizer) if tokenizer else ""
    found = {} if vae is None else {"vae": digest(vae)}
    return found if text_encoder is None else found | {"text": digest(text_encoder, beside)}


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
    if config.model and config.condition is None and (classes := reads.classes(config)):
        found["model.classes"] = list(classes)
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
) -> tuple[AutoencoderKL | None, CLIPTokenizer | None, CLIPTextModel | None]:
    """Autoencoder, tokenizer and text encoder of ``config``, as far as it has them; see
    ``build``.
    """
    vae = None if reads.pixels(config) else _vae(config, meta)
    if reads.classes(config) is not None:
        return vae, None, None
    return vae, *make_text(config, captions, meta=meta)


def _vae(config: TrainConfig, meta: bool) -> AutoencoderKL:
    if isinstance(config.vae, VaeShape):
        return make_vae(config.vae, config.seed, meta=meta)
    return read_vae(str(config.vae or in_model(config.model, "vae", "vae")), meta=meta)


def _unet(config: TrainConfig, parts: Parts, meta: bool) -> UNet2DConditionModel | UNet2DModel:
    channels, objective, process = parts.codec.channels, parts.objective, parts.process
    width = parts.text_encoder.config.hidden_size if parts.text_encoder else None
    labels = len(parts.classes) + 1 if parts.classes else None
    if config.unet is None:
        cls = UNet2DModel if width is None else UNet2DConditionModel
        folder = in_model(config.model, "unet", "unet")
        kind = reads.settings(folder).get("_class_name", cls.__name__)
        if kind != cls.__name__:
            told = "reads text" if width is None else "reads no text"
            raise ConfigError(
                f"condition: the U-Net of {config.model} {told} ({kind}): leave condition out, or"
                " describe another unet"
            )
        unet = read(cls, folder, "unet", meta)
        returned = channels * (2 if objective.learned_variance else 1)
        if (unet.config.in_channels, unet.config.out_channels) != (channels, returned):
            told = f" of which a learned variance makes {returned}" if returned > channels else ""
            has = f"the autoencoder has {channels} latent" if parts.vae else "a picture has 3"
            raise ConfigError(
                f"the U-Net of {config.model} takes {unet.config.in_channels} channels and returns"
                f" {unet.config.out_channels}, {has} channels{told}"
            )
        if width is not None and unet.config.cross_attention_dim != width:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {unet.config.cross_attention_dim}, the text encoder writes {width}"
            )
        if width is None and unet.config.num_class_embeds != labels:
            raise ConfigError(
                f"the U-Net of {config.model} has {unet.config.num_class_embeds or 'no'} labels,"
                f" condition makes {labels or 'none'}: classes, and one for no class"
            )
        return unet
    fourier, turns = config.unet.time_embedding == "fourier", config.unet.fourier_scale or 16.0
    if fourier and width is None and objective.target != "score":
        raise ConfigError(
            "unet.time_embedding: without text the U-Net with Fourier features divides by sigma,"
            f" which makes a score and no {objective.target!r}: use positional"
        )

    def make() -> UNet2DConditionModel | UNet2DModel:
        unet = make_unet(
            config.unet,
            channels,
            width,
            latent_side(parts.vae, config.images),
            labels=labels,
            learned_variance=objective.learned_variance,
        )
        if fourier:
            first, last = process.timestep(torch.tensor([0.0, 1.0], device="cpu")).tolist()
            if width is None:  # of log(sigma), drawn from N(0, 16^2)
                first, last = 64 * first, 64 * last
            unet.time_proj.weight.data *= turns / (last - first)  # drawn from N(0, 1)
        return unet

    with described("unet"):
        if meta:
            return on_meta(make)
        with initialised(config.seed, "unet"):
            return make()


def latent_side(vae: AutoencoderKL | None, images: ImageTransform) -> int:
    """Side of the latent of a square picture; ``ConfigError`` if that of any shape is not whole."""
    factor = codec_of(vae).factor
    key, value = ("buckets.step", images.buckets.step) if images.buckets else ("size", images.size)
    if value % factor:
        raise ConfigError(
            f"images.{key} {value} is no multiple of {factor}, the pixels of a latent"
        )
    return images.size // factor


def make_unet(
    shape: UNetShape,
    channels: int,
    width: int | None,
    side: int,
    *,
    labels: int | None = None,
    learned_variance: bool = False,
) -> UNet2DConditionModel | UNet2DModel:
    """A U-Net of ``shape`` for latents of ``channels`` and ``side``, tokens of ``width`` (None:
    it reads no text), and so many ``labels``, if any.
    """
    levels = len(shape.block_out_channels)
    attention = shape.attention or (True,) * (levels - 1) + (False,)
    if len(attention) != levels:
        raise ConfigError(
            f"unet.attention has {len(attention)} entries for {levels} block_out_channels"
        )
    attending = "Attn" if width is None else "CrossAttn"
    common: dict[str, Any] = dict(
        sample_size=side,
        in_channels=channels,
        out_channels=channels * (2 if learned_variance else 1),
        block_out_channels=shape.block_out_channels,
        layers_per_block=shape.layers_per_block,
        down_block_types=tuple(f"{attending if a else ''}DownBlock2D" for a in attention),
        up_block_types=tuple(f"{attending if a else ''}UpBlock2D" for a in reversed(attention)),
        attention_head_dim=shape.attention_head_dim,
        norm_num_groups=shape.norm_num_groups,
        resnet_time_scale_shift="scale_shift" if shape.scale_shift else "default",
        time_embedding_type=shape.time_embedding or "positional",
        num_class_embeds=labels,
    )
    if width is None:
        return UNet2DModel(**common)
    linear = shape.use_linear_projection
    return UNet2DConditionModel(**common, cross_attention_dim=width, use_linear_projection=linear)


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
