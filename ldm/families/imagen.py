"""``imagen``: text -> pixels in stages (Saharia et al. 2022), in the folders of DeepFloyd IF.

    tokens = those of a T5 that is told its mask, through a linear layer
    time embedding of the U-Net += attention pooling of the T5's tokens
    of a super-resolution stage:  x = [x_t, low],  time embedding += MLP(sinusoids of low's level)

with low the smaller picture, scaled up and noised (``ldm.models.aside``). Pictures are their own
latents, and the variance is learnt. A base and its super-resolution stages are folders of one
family: what is told a picture has 6 channels in place of 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from ldm.config.aside import LowResolutionSettings
from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.index import NOISING, OF_OTHERS
from ldm.families.model import Family, Model, Tower
from ldm.families.noised import aside_process, noise_level, noising_scheduler, of_each
from ldm.families.unet import check_channels, described_unet, guidance_told, stated
from ldm.formats.integrity import json_object
from ldm.models.aside import LOW, LOW_TIMESTEP, Drawn, LowResolution, enlarged
from ldm.models.pictures import pixels_of
from ldm.models.wrapped import bare

PIXELS = 3
LENGTH = 77
"""Tokens of every text, as in stock."""
LEVEL = 250
"""Number of its level where a drawing does not say, as in stock."""
HEAD = 64


class Imagen(Family):
    """A T5, and a U-Net of pixels that may be told a smaller picture."""

    name = "imagen"
    stock = ("IFPipeline", "IFSuperResolutionPipeline")
    towers = (
        Tower(
            "text_encoder", "tokenizer", T5EncoderModel, None, None, T5Tokenizer, LENGTH,
            masked=True, lower=True,
        ),
    )  # fmt: skip
    drawing = {"num_inference_steps": 100, "guidance_scale": 7.0}
    stepping = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    reads = UNet2DConditionModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There is a U-Net, and a T5 or nothing beside it that it reads in a T5's way."""
        tower, unet = bare(parts.get("text_encoder")), parts.get("unet")
        alone = tower is None and stated(unet, "encoder_hid_dim_type") == "text_proj"
        return unet is not None and (alone or isinstance(tower, T5EncoderModel))

    def aside(self, config: TrainConfig, model: Model) -> LowResolution | None:
        """The smaller picture, of a network of 6 channels."""
        asked = config.aside
        own = config.network is None and config.model
        if own:
            taken = _taken(Path(own) / self.network)
            if asked is None and taken == 2 * PIXELS:
                asked = LowResolutionSettings()
            elif asked is not None and taken == PIXELS:
                raise ConfigError(f"aside: the U-Net of {own} enlarges no picture: leave it out")
        if asked is None:
            return None
        if not isinstance(asked, LowResolutionSettings):
            raise ConfigError(
                f"aside.kind: a model of the family imagen is told low_resolution, not {asked.kind}"
            )
        process = aside_process(asked, own or None)
        buckets = config.images.buckets
        key, side = ("buckets.step", buckets.step) if buckets else ("size", config.images.size)
        if side % asked.factor:
            raise ConfigError(f"images.{key} {side} is no multiple of aside.factor {asked.factor}")
        return LowResolution(asked.factor, process, asked.levels)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``UNet2DConditionModel`` in whose attention text and picture are side by side."""
        shape = config.unet
        assert shape is not None
        self._check_run(model)
        levels = len(shape.block_out_channels)
        attention = shape.attention or (False, *(True,) * (levels - 1))
        width = model.networks["text_encoder"].config.d_model
        return described_unet(
            config,
            model,
            shape.block_out_channels[-1],
            in_channels=PIXELS if model.aside is None else 2 * PIXELS,
            down_block_types=tuple(
                "SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention
            ),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=tuple(
                "SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D"
                for a in reversed(attention)
            ),
            act_fn="gelu",
            time_embedding_act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            cross_attention_norm="group_norm",
            encoder_hid_dim=width,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=max(1, width // HEAD),
            class_embed_type=None if model.aside is None else "timestep",
        )

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of pixels, width of tokens that of the T5."""
        self._check_run(model)
        if model.aside is None:
            check_channels(config, model, network)
        width = model.networks["text_encoder"].config.d_model
        if network.config.encoder_hid_dim != width:
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {network.config.encoder_hid_dim}, the text encoder writes {width}"
            )

    def _check_run(self, model: Model) -> None:
        if model.codec.network is not None:
            raise ConfigError("vae: models of the family imagen are of pixels: set vae to pixels")
        if not model.learned_variance:
            raise ConfigError(
                "objective.learned_variance: networks of the family imagen predict a variance too:"
                " set it to true"
            )
        length = model.conditioner.towers["text_encoder"].length
        if length < LENGTH:
            raise ConfigError(
                f"text.max_length {length}: stock reads {LENGTH} tokens of every text, padding"
                " among them: it must be as many at least"
            )

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens reach attention and the embedding of the timestep, the smaller picture lies behind
        ``x_t``, and its level reaches the embedding as well.
        """
        low = cond.extra.get(LOW)
        x = x_t if low is None else torch.cat([x_t, low.to(x_t)], 1)
        return network(
            x,
            timestep,
            encoder_hidden_states=cond.tokens,
            class_labels=cond.extra.get(LOW_TIMESTEP),
            **guidance_told(network, x_t, cond),
        ).sample

    def channels(self, network: nn.Module) -> int:
        """3, also of a network that is told a picture."""
        return PIXELS

    def shown(self, network: nn.Module) -> bool:
        """Whether it enlarges a picture."""
        return bare(network).config.in_channels == 2 * PIXELS

    def enlarges(self, network: nn.Module) -> bool:
        """The same."""
        return self.shown(network)

    def beside(
        self,
        asked: dict[str, Any],
        parts: Mapping[str, Any],
        pictures: Drawn,
        size: tuple[int, int],
        device: Any,
    ) -> dict[str, Tensor]:
        """``image``, which is enlarged, and ``noise_level``, the number of its level: as in stock.

        Its noise comes from the generators of the pictures, behind that which they are drawn from.
        """
        network = bare(parts["unet"])
        image, level = asked.pop("image", None), asked.pop("noise_level", None)
        if not self.shown(network):
            if level is not None:
                raise ValueError("noise_level: this model is told no picture that could be noised")
            return {}
        if image is None:
            raise ValueError("image: this model enlarges a picture: pass one, or use a Cascade")
        scheduler = parts[NOISING]
        level = noise_level(level, scheduler, LEVEL)
        low = of_each("image", pixels_of(image).to(device, torch.float32), pictures)
        shape = (len(pictures), PIXELS, *size)
        noise = randn_tensor(shape, pictures.generators, device, torch.float32)
        levels = torch.full((len(pictures),), level, device=device)
        large = enlarged(low, size)
        return {LOW: scheduler.add_noise(large, noise, levels), LOW_TIMESTEP: levels}

    def keys(self, model: Model) -> dict[str, Any]:
        """The noise of the smaller picture, as a scheduler that nobody steps."""
        if model.aside is None:
            return {}
        return {NOISING: noising_scheduler(model.aside.process)}

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``IFPipeline``, or ``IFSuperResolutionPipeline`` where a picture is told."""
        others = {*OF_OTHERS, "classes", "vae", "image_encoder"} - {NOISING}
        kept = {key: value for key, value in index.items() if key not in others}
        if kept[NOISING][0] is not None:
            return kept | {"_class_name": self.stock[1]}
        del kept[NOISING]
        return kept | {"_class_name": self.stock[0]}


def _taken(folder: Path) -> int | None:
    """Channels that the U-Net of ``folder`` takes; None: it cannot be read, which who opens it
    tells.
    """
    try:
        return json_object(folder / "config.json").get("in_channels")
    except (OSError, ValueError):
        return None
