"""``unclip_prior``: text -> the embedding of a picture (Ramesh et al. 2022, section 2.2).

    z = (e - mean) / std,   e the embedding of the picture by a CLIP
    tokens of the transformer = [tokens of the text, its embedding, time, z_t, one that is read]

It predicts z itself. Nobody's stock pipeline opens its folder alone: with a decoder it becomes one
of Stable unCLIP (``ldm.families.unclip``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import PriorTransformer
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition, predictor, target_of
from ldm.errors import ConfigError
from ldm.families.index import OF_OTHERS, OF_PRIOR, OF_SD
from ldm.families.model import Family, FamilyDenoiser, Model, Tower
from ldm.families.picture_tower import PROCESSOR
from ldm.guidance import ClassifierFree
from ldm.models.aside import Drawn
from ldm.models.codec import Codec
from ldm.models.embedding import PICTURE_TOWER, EmbeddingCodec, PictureTower
from ldm.models.wrapped import bare
from ldm.sampling import own_sampler

STEPS, SCALE = 25, 4.0
"""Of a drawing where nothing else is asked for, as in stock."""


class UnclipPrior(Family):
    """A CLIP text tower with its projection, and a transformer of embeddings."""

    name = "unclip_prior"
    network = "prior"
    towers = (Tower("text_encoder", "tokenizer", CLIPTextModelWithProjection, None, "text_embeds"),)
    pooled = picture_tower = embeds = True
    statistics = ("prior", "clip_mean", "clip_std")
    unlearnt = statistics[1:]
    drawing = {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    reads = PriorTransformer

    @property
    def adaptable(self) -> list[str]:
        """The text tower alone: diffusers reads no LoRA of a prior."""
        return [tower.part for tower in self.towers]

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There is a prior, and nothing that draws of what it says."""
        return parts.get("prior") is not None and parts.get("unet") is None

    def codec(self, parts: Mapping[str, Any]) -> Codec:
        """The picture tower."""
        return EmbeddingCodec(
            PictureTower(parts[PICTURE_TOWER], parts[PROCESSOR]), parts.get("prior")
        )

    def measures(self, config: TrainConfig) -> bool:
        """A new network has none."""
        return config.network is not None

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``PriorTransformer``."""
        shape = config.prior
        assert shape is not None
        width = _width(model)
        tower = model.conditioner.towers["text_encoder"]
        prior = PriorTransformer(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            num_layers=shape.layers,
            embedding_dim=width,
            num_embeddings=tower.length,
            embedding_proj_dim=model.networks["text_encoder"].config.projection_dim,
        )
        for part in (prior.positional_embedding, prior.prd_embedding):
            nn.init.normal_(part, std=0.02)
        nn.init.ones_(prior.clip_std)
        return prior

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Widths are those of the towers, tokens as many as a text has."""
        width, has = _width(model), network.config
        if has.embedding_dim != width:
            raise ConfigError(
                f"the prior of {config.model} makes embeddings of width {has.embedding_dim}, the"
                f" picture tower of width {width}"
            )
        pooled = model.networks["text_encoder"].config.projection_dim
        if (has.embedding_proj_dim or width) != pooled:
            raise ConfigError(
                f"the prior of {config.model} reads texts of width"
                f" {has.embedding_proj_dim or width}, the text encoder projects to {pooled}"
            )
        length = model.conditioner.towers["text_encoder"].length
        if has.num_embeddings != length:
            raise ConfigError(
                f"the prior of {config.model} reads {has.num_embeddings} tokens, the tokenizer"
                f" makes {length}"
            )

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b d"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b d"]:
        """Tokens and pooled text stand before time and ``x_t``; padding is not attended to."""
        assert cond.tokens is not None
        mask = cond.mask
        if mask is None:
            mask = torch.ones(cond.tokens.shape[:2], dtype=torch.bool, device=x_t.device)
        return network(
            x_t,
            timestep.expand(len(x_t)),
            proj_embedding=cond.pooled,
            encoder_hidden_states=cond.tokens,
            attention_mask=mask,
        ).predicted_image_embedding

    def channels(self, network: nn.Module) -> int:
        """Numbers of an embedding."""
        return bare(network).config.embedding_dim

    def inpaints(self, network: nn.Module) -> bool:
        """Never."""
        return False

    def side(self, network: nn.Module) -> None:
        """There are no pictures."""
        return None

    def state_side(self, network: Any, side: int) -> None:
        """Nothing says it."""

    def tokens(self, network: nn.Module, latent: Tensor) -> int:
        """An embedding is one."""
        return 1

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Under the name of this library's own pipeline."""
        others = {*OF_OTHERS, *OF_SD, "classes", "unet", "vae"}
        return {key: value for key, value in index.items() if key not in others}

    def embedded(self, parts: Mapping[str, Any], pictures: Any, device: Any) -> Tensor:
        """By the picture tower."""
        return PictureTower(parts[PICTURE_TOWER], parts[PROCESSOR]).of(pictures, device)

    def text_embedded(self, parts: Mapping[str, Any], texts: list[str], device: Any) -> Tensor:
        """By the text tower."""
        pooled = self.conditioner(parts, parts).encode(texts).pooled
        assert pooled is not None
        return pooled.to(device).float()

    def imagined(
        self,
        parts: Mapping[str, Any],
        pictures: Drawn,
        device: Any,
        *,
        steps: int | None,
        scale: float | None,
        noise: Tensor | None,
    ) -> Float[Tensor, "n d"]:
        """Embeddings that the prior of a whole folder makes of the texts of ``pictures``, as stock
        draws them.

        Args:
            parts: of the folder.
            pictures: with generators, which draw first what this needs.
            device: where the networks are.
            steps: None: ``STEPS``.
            scale: of classifier-free guidance; None: ``SCALE``.
            noise: standard normal ``n d``; None: a draw.

        Raises:
            ValueError: the noise is of another shape.
        """
        own = whole(parts)
        network, scheduler = bare(own["prior"]), own["scheduler"]
        conditioner, dtype = self.conditioner(own, own), own["prior"].dtype
        shape, count = (len(pictures), self.channels(network)), len(pictures)
        if noise is None:
            noise = randn_tensor(shape, pictures.generators, device, torch.float32)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"prior_latents have shape {tuple(noise.shape)}, not {shape}")
        told = conditioner.encode(pictures.prompts).to(device, dtype)
        told = told.map(lambda x: x.repeat_interleave(pictures.each, 0))
        inside = FamilyDenoiser(self, own["prior"])

        def denoise(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            return inside(x_t.to(dtype), timestep, cond).float()

        predict = predictor(denoise, target_of(scheduler.config))
        scale = SCALE if scale is None else scale
        if scale > 1:
            null = conditioner.encode([""]).to(device, dtype)
            null = null.map(lambda x: x.expand(count, *x.shape[1:]))
            predict = ClassifierFree(scale)(predict, null)
        z = own_sampler(scheduler)(
            predict,
            noise.to(device, torch.float32),
            told,
            steps=STEPS if steps is None else steps,
            generators=pictures.generators,
        )
        return z * network.clip_std.float() + network.clip_mean.float()


def whole(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The prior of a whole folder, of the components ``parts``, as a folder of its own has it."""
    own = {name.removeprefix("prior_"): parts.get(name) for name in OF_PRIOR}
    return own | {name: parts.get(name) for name in (PICTURE_TOWER, PROCESSOR)}


def _width(model: Model) -> int:
    """Of embeddings."""
    width = model.networks[PICTURE_TOWER].config.projection_dim
    text = model.networks["text_encoder"].config
    if not hasattr(model.networks["text_encoder"], "text_projection"):
        raise ConfigError(
            "text: a prior reads the embedding of a text, and this text encoder has no projection:"
            " name a folder of transformers' or diffusers' that has"
        )
    if text.hidden_size != width:
        raise ConfigError(
            f"text: a prior reads tokens as wide as embeddings are ({width}), and those of the text"
            f" encoder are {text.hidden_size} wide: take both from one CLIP"
        )
    return width
