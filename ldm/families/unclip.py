"""``unclip``: the embedding of a picture -> pictures of it, in the folders of Stable unCLIP.

    time embedding of the U-Net += MLP([e + noise, sinusoids of the level])

with e the embedding of the picture by a CLIP, noised (``ldm.models.embedding``), and the text read
by attention as in Stable Diffusion (Ramesh et al. 2022, section 2.1). A folder of the decoder alone
draws variations of pictures; with a prior (``ldm.families.unclip_prior``) it draws texts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm.config.aside import ImageEmbeddingSettings
from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition, VariancePreserving, process_of
from ldm.errors import ConfigError
from ldm.families.index import NOISING, OF_OTHERS, OF_PRIOR, OF_SD
from ldm.families.model import Family, Model, Tower
from ldm.families.networks import on_meta, read
from ldm.families.noised import aside_process, noise_level, noising_scheduler, of_each
from ldm.families.picture_tower import PROCESSOR
from ldm.families.unclip_prior import UnclipPrior, whole
from ldm.families.unet import check_channels, described_unet
from ldm.models.aside import Drawn
from ldm.models.embedding import (
    EMBEDDED,
    EMBEDDING,
    PICTURE_TOWER,
    ImageEmbedding,
    PictureTower,
)
from ldm.models.wrapped import bare
from ldm.storage.tensor_cache import fingerprint

NORMALISER = "image_normalizer"
PRIOR = UnclipPrior()
_OF_PRIOR = {
    "steps": "prior_num_inference_steps",
    "scale": "prior_guidance_scale",
    "noise": "prior_latents",
}
"""Arguments of a call that are of the prior, by those of ``UnclipPrior.imagined``."""


class Unclip(Family):
    """Stable Diffusion that is told an embedding of the picture beside the text."""

    name = "unclip"
    stock = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
    towers = (Tower("text_encoder", "tokenizer", CLIPTextModel),)
    skips = picture_tower = before = True
    statistics = (NORMALISER, "mean", "std")
    grows_from = "sd"
    drawing = {"num_inference_steps": 20, "guidance_scale": 10.0}
    reads = UNet2DConditionModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There are a U-Net and what normalises embeddings."""
        return parts.get(NORMALISER) is not None and parts.get("unet") is not None

    def further(
        self, config: TrainConfig, networks: Mapping[str, Any], *, meta: bool
    ) -> dict[str, Any]:
        """What normalises embeddings."""
        if not self.measures(config):
            folder = Path(config.model or "") / NORMALISER
            return {NORMALISER: read(StableUnCLIPImageNormalizer, folder, "model", meta)}
        width = networks[PICTURE_TOWER].config.projection_dim
        if meta:
            return {NORMALISER: on_meta(lambda: StableUnCLIPImageNormalizer(width))}
        return {NORMALISER: StableUnCLIPImageNormalizer(width)}

    def measures(self, config: TrainConfig) -> bool:
        """Unless ``model`` has them, and it is its picture tower that they are of."""
        has = config.model is not None and (Path(config.model) / NORMALISER).is_dir()
        return config.image_encoder is not None or not has

    def aside(self, config: TrainConfig, model: Model) -> ImageEmbedding:
        """The embedding of the picture."""
        asked = config.aside or ImageEmbeddingSettings()
        if not isinstance(asked, ImageEmbeddingSettings):
            raise ConfigError(
                f"aside.kind: a model of the family unclip is told image_embedding, not"
                f" {asked.kind}"
            )
        tower = PictureTower(model.networks[PICTURE_TOWER], model.tokenizers[PROCESSOR])
        process = aside_process(asked, config.model)
        normaliser = model.networks[NORMALISER]
        return ImageEmbedding(tower, normaliser, process, asked.levels, asked.dropout)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``UNet2DConditionModel`` with ``class_embed_type`` "projection"."""
        return described_unet(
            config,
            model,
            model.networks["text_encoder"].config.hidden_size,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * _width(model),
        )

    def grow(self, config: TrainConfig, model: Model, network: Any) -> None:
        """A projection of the embedding, which says nothing yet: its last layer is 0."""
        if network.config.class_embed_type is not None:
            return
        if config.adds or "unet" not in config.train:
            key = "lora" if config.lora else "textual_inversion" if config.adds else "train"
            raise ConfigError(
                f"{key}: the U-Net of {config.model} is told no embedding yet: what reads it must"
                " learn: train the whole unet first"
            )
        told, width = 2 * _width(model), network.time_embedding.linear_2.out_features
        network.class_embedding = TimestepEmbedding(told, width)
        nn.init.zeros_(network.class_embedding.linear_2.weight)
        nn.init.zeros_(network.class_embedding.linear_2.bias)
        network.register_to_config(
            class_embed_type="projection", projection_class_embeddings_input_dim=told
        )

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of the autoencoder, widths those of the towers."""
        check_channels(config, model, network)
        has, text = network.config, model.networks["text_encoder"].config.hidden_size
        if has.cross_attention_dim != text:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width {has.cross_attention_dim}, the"
                f" text encoder writes {text}"
            )
        told = has.class_embed_type, has.projection_class_embeddings_input_dim
        if told != ("projection", 2 * _width(model)):
            raise ConfigError(
                f"the U-Net of {config.model} is not told an embedding of width {_width(model)} and"
                " its level: it is of another image_encoder"
            )

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens reach cross-attention, the embedding that of the timestep."""
        return network(
            x_t,
            timestep,
            encoder_hidden_states=cond.tokens,
            class_labels=cond.extra[EMBEDDED].to(x_t.dtype),
        ).sample

    def shown(self, network: nn.Module) -> bool:
        """Always: the picture that is varied."""
        return True

    def unsaid(self, beside: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zeros, as in stock."""
        return {name: torch.zeros_like(value) for name, value in beside.items()}

    def beside(
        self,
        asked: dict[str, Any],
        parts: Mapping[str, Any],
        pictures: Drawn,
        size: tuple[int, int],
        device: Any,
    ) -> dict[str, Tensor]:
        """``image``, of which the embedding is told, or ``image_embeds``, or else what the prior
        makes of the text (``prior_num_inference_steps``, ``prior_guidance_scale``,
        ``prior_latents``); and ``noise_level``, the number of its level: as in stock.

        Of one generator for all, an embedding that several pictures share is noised once, as in
        stock; a picture of a generator of its own has noise of its own.
        """
        image, embeds = asked.pop("image", None), asked.pop("image_embeds", None)
        level = noise_level(asked.pop("noise_level", None), parts[NOISING], 0)
        prior = {name: asked.pop(key, None) for name, key in _OF_PRIOR.items()}
        if image is not None and embeds is not None:
            raise ValueError("pass either image or image_embeds, not both")
        if image is None and embeds is None:
            if parts.get("prior") is None:
                raise ValueError(
                    "image: this decoder draws of pictures: pass one, or image_embeds, or put a"
                    " prior before it (ldm export OUT --prior PRIOR --decoder DECODER)"
                )
            embeds = PRIOR.imagined(parts, pictures, device, **prior)
        else:
            if given := [_OF_PRIOR[name] for name, value in prior.items() if value is not None]:
                raise ValueError(f"{given[0]} is of the prior, which draws where there is no image")
            if image is not None:
                embeds = self.embedded(parts, image, device)
        told = _told(parts, embeds).to(device, torch.float32)
        if isinstance(pictures.generators, list):
            told = of_each("image_embeds", told, pictures)
        noise = randn_tensor(tuple(told.shape), pictures.generators, device, torch.float32)
        process = process_of(parts[NOISING].config)
        assert isinstance(process, VariancePreserving)
        aside = ImageEmbedding(None, bare(parts[NORMALISER]), process)
        drawn = {
            "noise": noise,
            "level": torch.full((len(told),), level, device=device),
            "told": torch.ones(len(told), dtype=torch.bool, device=device),
        }
        found = aside.told({EMBEDDING: told}, drawn)
        return {name: of_each("image_embeds", x, pictures) for name, x in found.items()}

    def embedded(self, parts: Mapping[str, Any], pictures: Any, device: Any) -> Tensor:
        """By the picture tower."""
        if parts.get(PICTURE_TOWER) is None or parts.get(PROCESSOR) is None:
            raise ValueError("image: this folder has no picture tower: pass image_embeds")
        return PRIOR.embedded(parts, pictures, device)

    def text_embedded(self, parts: Mapping[str, Any], texts: list[str], device: Any) -> Tensor:
        """By the text tower of the prior."""
        if parts.get("prior") is None:
            raise ValueError("there is no prior, whose text encoder makes embeddings of texts")
        return PRIOR.text_embedded(whole(parts), texts, device)

    def keys(self, model: Model) -> dict[str, Any]:
        """The noise of the embedding."""
        assert model.aside is not None
        return {NOISING: noising_scheduler(model.aside.process)}

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``StableUnCLIPPipeline``, or ``StableUnCLIPImg2ImgPipeline`` without a prior."""
        others = {*OF_OTHERS, *OF_SD, "classes"} - {NOISING}
        kept = {key: value for key, value in index.items() if key not in others}
        return kept | {"_class_name": self.stock[0 if "prior" in kept else 1]}


def joined(prior: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Components of a whole folder: those of ``decoder``, and of the folder ``prior`` before it.

    Raises:
        ValueError: they are not of embeddings of one picture tower.
    """
    one, other = (fingerprint(parts[PICTURE_TOWER]) for parts in (prior, decoder))
    if one != other:
        raise ValueError(
            "the prior makes embeddings of another picture tower than the decoder draws of: train"
            " both with one image_encoder"
        )
    before = {name: prior[name.removeprefix("prior_")] for name in OF_PRIOR}
    return {**decoder, **before}


def _width(model: Model) -> int:
    """Of embeddings."""
    return model.networks[PICTURE_TOWER].config.projection_dim


def _told(parts: Mapping[str, Any], embeds: Any) -> Tensor:
    """``image_embeds``; ``ValueError`` unless they are rows of the network's width."""
    width = bare(parts["unet"]).config.projection_class_embeddings_input_dim // 2
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != width:
        shape = f"of shape {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else repr(embeds)
        raise ValueError(f"image_embeds must be a tensor n {width}, not {shape[:100]}")
    if not bool(embeds.isfinite().all()):
        raise ValueError("image_embeds hold nan or inf")
    return embeds
