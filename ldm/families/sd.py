"""``sd``: Stable Diffusion 1 and 2, and every model of one CLIP text tower and one U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.index import OF_OTHERS
from ldm.families.model import Family, Model, Tower
from ldm.families.unet import check_channels, described_unet, guidance_told, inpainting
from ldm.models.control import side_inputs
from ldm.models.wrapped import bare


class StableDiffusion(Family):
    """Text through cross-attention (Rombach et al. 2022).

    As in stock Stable Diffusion the mask of padding tokens does not reach cross-attention.
    """

    name = "sd"
    side_networks = {
        "controlnet": "StableDiffusionControlNetPipeline",
        "adapter": "StableDiffusionAdapterPipeline",
    }
    stock = ("StableDiffusionPipeline", *side_networks.values())
    towers = (Tower("text_encoder", "tokenizer", CLIPTextModel),)
    skips = True
    reads = UNet2DConditionModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """A U-Net that reads tokens, and at most one text tower; in latent space or of pixels."""
        unet = parts.get("unet")
        reads = isinstance(bare(unet), UNet2DConditionModel)
        return unet is not None and (reads or parts.get("text_encoder") is not None)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``UNet2DConditionModel``."""
        width = model.networks["text_encoder"].config.hidden_size
        return described_unet(config, model, width)

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of the autoencoder, widths of tokens those of the text encoder."""
        check_channels(config, model, network)
        width = model.networks["text_encoder"].config.hidden_size
        if network.config.cross_attention_dim != width:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {network.config.cross_attention_dim}, the text encoder writes {width}"
            )

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens reach cross-attention."""
        x, told = inpainting(x_t, cond), guidance_told(network, x_t, cond)
        told |= self.arguments(network, cond)
        return network(x, timestep, **side_inputs(told, cond)).sample

    def arguments(self, network: nn.Module, cond: Condition) -> dict[str, Any]:
        """The tokens."""
        return {"encoder_hidden_states": cond.tokens}

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``StableDiffusionPipeline``, or of its kind with a network beside; a model of
        text and pixels has no stock pipeline.
        """
        kept = {key: value for key, value in index.items() if key not in OF_OTHERS}
        if index["vae"][0] is None:
            return kept
        beside = (cls for part, cls in self.side_networks.items() if part in kept)
        name = next(beside, self.stock[0])
        return {k: v for k, v in kept.items() if k != "classes"} | {"_class_name": name}
