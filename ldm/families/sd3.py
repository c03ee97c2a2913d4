"""``sd3``: Stable Diffusion 3 and 3.5 (Esser et al. 2024), rectified flows on an MM-DiT.

    tokens = [tower 1, tower 2] at their last hidden states but one, side by side, filled up with
             zeros to the width of tower 3; behind them those of tower 3
    pooled = [projection of tower 1, projection of tower 2]

Text and picture are two streams that attend to each other. Tower 3, a T5, may be absent: zeros
stand for its tokens, as in stock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5Tokenizer

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.diffusion.schedulers import FLOW_EULER
from ldm.errors import ConfigError
from ldm.families.flow import ATTENTION, LONGEST, check_run, left_out, taken
from ldm.families.index import OF_IMAGEN, OF_SD, OF_SDXL
from ldm.families.model import Family, Model, Tower
from ldm.models.conditioner import Conditioner, Towers
from ldm.models.mmdit import initialise
from ldm.models.wrapped import bare

T5 = "text_encoder_3"
LENGTH = 256
"""Tokens of the T5, as in stock where nothing else is asked for."""


class StableDiffusion3(Family):
    """Two CLIP towers and a T5, and a transformer of two streams."""

    name = "sd3"
    stock = ("StableDiffusion3Pipeline",)
    network = "transformer"
    towers = (
        Tower("text_encoder", "tokenizer", CLIPTextModelWithProjection, -2, "text_embeds"),
        Tower("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection, -2, "text_embeds"),
        Tower(T5, "tokenizer_3", T5EncoderModel, None, None, T5Tokenizer, LENGTH),
    )
    flow = FLOW_EULER
    mutes = pooled = skips = True
    longest = LONGEST
    encoded = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    offers = {"pooled_prompt_embeds": "pooled"}
    targets = ATTENTION
    reads = SD3Transformer2DModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There is an ``SD3Transformer2DModel``."""
        return isinstance(bare(parts.get("transformer")), SD3Transformer2DModel)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """An ``SD3Transformer2DModel`` that says 0."""
        shape = config.transformer
        assert shape is not None
        left_out(shape, self.name, "single_layers", "guidance")
        check_run(config, model, shape.patch_size, shape.positions)
        tokens, pooled = _widths(model)
        network = SD3Transformer2DModel(
            sample_size=model.codec.shape(config.images.size, config.images.size)[-1],
            patch_size=shape.patch_size,
            in_channels=model.codec.channels,
            out_channels=model.codec.channels,
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            caption_projection_dim=shape.heads * shape.head_dim,
            joint_attention_dim=tokens,
            pooled_projection_dim=pooled,
            pos_embed_max_size=shape.positions,
            dual_attention_layers=tuple(range(shape.dual_attention)),
            qk_norm="rms_norm" if shape.qk_norm else None,
        )
        initialise(network, told=network.time_text_embed, output=network.proj_out)
        return network

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of the autoencoder, widths those of the text encoders."""
        has = network.config
        check_run(config, model, has.patch_size, has.pos_embed_max_size)
        if (channels := model.codec.channels) != has.in_channels:
            raise ConfigError(
                f"the transformer of {config.model} takes {has.in_channels} channels, the"
                f" autoencoder has {channels} latent channels"
            )
        tokens, pooled = _widths(model)
        if pooled != has.pooled_projection_dim:
            raise ConfigError(
                f"the transformer of {config.model} reads pooled text of width"
                f" {has.pooled_projection_dim}, the CLIP text encoders write {pooled}: it needs"
                " those that it was trained with"
            )
        least = tokens if T5 in model.networks else has.joint_attention_dim
        if tokens > has.joint_attention_dim or least != has.joint_attention_dim:
            raise ConfigError(
                f"the transformer of {config.model} reads tokens of width"
                f" {has.joint_attention_dim}, the text encoders write {tokens}"
            )

    def join(
        self, said: Sequence[Condition], networks: Mapping[str, Any], length: int = LENGTH
    ) -> Condition:
        """Tokens of the CLIP towers side by side, behind them those of the T5, of which there are
        ``length`` where it is absent.
        """
        parts = [tower.part for tower in self.present(networks)]
        by_part = dict(zip(parts, said, strict=True))
        t5 = by_part.pop(T5, None)
        clip = torch.cat([cond.tokens for cond in by_part.values()], -1)
        reader = bare(networks.get("transformer"))
        if reader is None and t5 is None:
            raise ValueError(
                "encode_prompt: how wide tokens are says the transformer, or a T5: leave one there"
            )
        width = t5.tokens.shape[-1] if reader is None else reader.config.joint_attention_dim
        clip = nn.functional.pad(clip, (0, width - clip.shape[-1]))
        late = clip.new_zeros(len(clip), length, width) if t5 is None else t5.tokens
        pooled = torch.cat([cond.pooled for cond in by_part.values()], -1)
        return Condition(torch.cat([clip, late], 1), None, pooled)

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens are the second stream, the pooled text joins the embedding of the timestep."""
        return network(
            x_t,
            timestep=timestep.expand(len(x_t)),
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
        ).sample

    def conditioner(
        self,
        networks: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        classes: Sequence[str] | None = None,
        *,
        zeros: bool = False,
        length: int | None = None,
    ) -> Conditioner:
        """The towers; no text is what they say to the empty one, as in stock."""
        join = partial(self.join, networks=networks, length=LENGTH if length is None else length)
        return Towers(self._read(networks, tokenizers, length), join, mutes=True)

    def taken(self, steps: int, strength: float) -> int:
        """As in stock rounded up."""
        return taken(steps, strength)

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``StableDiffusion3Pipeline``."""
        others = (*OF_SD, *OF_SDXL, *OF_IMAGEN, "classes", "unet")
        kept = {key: value for key, value in index.items() if key not in others}
        return kept | {"_class_name": self.stock[0]}


def _widths(model: Model) -> tuple[int, int]:
    """Of the tokens, and of the pooled text, as far as there are towers for them."""
    present = {
        tower.part: model.networks[tower.part] for tower in model.family.present(model.networks)
    }
    t5 = present.pop(T5, None)
    if not present:
        raise ConfigError("text: the family sd3 needs one CLIP text encoder at least")
    side_by_side = sum(network.config.hidden_size for network in present.values())
    tokens = side_by_side if t5 is None else t5.config.d_model
    if tokens < side_by_side:
        raise ConfigError(
            f"text: the tokens of the T5 (hidden_size {tokens}) must be as wide as those of the"
            f" CLIP text encoders together ({side_by_side}), which are filled up to that"
        )
    return tokens, sum(network.config.projection_dim for network in present.values())
