"""U-Nets as configs describe them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from ldm.config.schema import TrainConfig
from ldm.config.shapes import UNetShape
from ldm.errors import ConfigError
from ldm.families.model import Model


def described_unet(
    config: TrainConfig, model: Model, width: int | None, **beside: Any
) -> UNet2DConditionModel | UNet2DModel:
    """The U-Net of ``config.unet`` from random init.

    Args:
        config: the run.
        model: whose channels it takes and returns.
        width: of its tokens; None: it reads no text.
        beside: further arguments of the class of diffusers.
    """
    shape = config.unet
    assert shape is not None
    unet = make_unet(
        shape,
        model.codec.channels,
        width,
        model.codec.shape(config.images.size, config.images.size)[-1],
        labels=len(model.classes) + 1 if model.classes else None,
        learned_variance=model.learned_variance,
        **beside,
    )
    if shape.time_embedding == "fourier":
        ends = torch.tensor([0.0, 1.0], device="cpu")
        first, last = model.process.timestep(ends).tolist()
        if width is None:  # of log(sigma), drawn from N(0, 16^2)
            first, last = 64 * first, 64 * last
        # Drawn from N(0, 1).
        unet.time_proj.weight.data *= (shape.fourier_scale or 16.0) / (last - first)
    return unet


def make_unet(
    shape: UNetShape,
    channels: int,
    width: int | None,
    side: int,
    *,
    labels: int | None = None,
    learned_variance: bool = False,
    **beside: Any,
) -> UNet2DConditionModel | UNet2DModel:
    """A U-Net of ``shape`` for latents of ``channels`` and ``side``, tokens of ``width`` (None:
    it reads no text), and so many ``labels``, if any; ``beside``: further arguments of its class.
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
        **beside,
    )
    if width is None:
        return UNet2DModel(**common)
    return UNet2DConditionModel(
        **common,
        cross_attention_dim=width,
        use_linear_projection=shape.use_linear_projection,
        transformer_layers_per_block=shape.transformer_layers,
    )


def check_channels(config: TrainConfig, model: Model, unet: nn.Module) -> None:
    """``ConfigError`` where ``unet``, of a folder, takes or returns other channels."""
    channels = model.codec.channels
    returned = channels * (2 if model.learned_variance else 1)
    if (unet.config.in_channels, unet.config.out_channels) != (channels, returned):
        told = f" of which a learned variance makes {returned}" if returned > channels else ""
        has = f"the autoencoder has {channels} latent"
        if model.codec.network is None:
            has = f"a picture has {channels}"
        raise ConfigError(
            f"the U-Net of {config.model} takes {unet.config.in_channels} channels and returns"
            f" {unet.config.out_channels}, {has} channels{told}"
        )
