"""U-Nets as configs describe them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ldm.config.schema import TrainConfig
from ldm.config.shapes import UNetShape
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.model import INPAINTED, Model
from ldm.guidance.told import SCALE
from ldm.models.wrapped import bare


def stated(unet: Any, key: str) -> Any:
    """What the config of ``unet`` says under ``key``; None: nothing, or it is known by name."""
    return getattr(bare(unet), "config", {}).get(key)


def described_unet(
    config: TrainConfig, model: Model, width: int | None, **beside: Any
) -> UNet2DConditionModel | UNet2DModel:
    """The U-Net of ``config.unet`` from random init.

    Args:
        config: the run.
        model: whose channels it takes and returns.
        width: of its tokens; None: it reads no text.
        beside: further arguments of the class of diffusers, or others in place of its own.
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
    it reads no text), and so many ``labels``, if any; ``beside``: further arguments of its class,
    or others in place of these.
    """
    levels = len(shape.block_out_channels)
    attention = shape.attention or (True,) * (levels - 1) + (False,)
    if len(attention) != levels:
        raise ConfigError(
            f"unet.attention has {len(attention)} entries for {levels} block_out_channels"
        )
    attending = "Attn" if width is None else "CrossAttn"
    common = dict[str, Any](
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
    common |= beside
    if width is None:
        return UNet2DModel(**common)
    return UNet2DConditionModel(
        **common,
        cross_attention_dim=width,
        use_linear_projection=shape.use_linear_projection,
        transformer_layers_per_block=shape.transformer_layers,
    )


def hears_guidance(unet: Any, width: int) -> None:
    """Lets ``unet`` be told a scale of guidance by an embedding of ``width``, of which it makes
    nothing yet (``cond_proj`` is 0); one that is told it already stays as it is.

    Raises:
        ConfigError: it has no place for it, or one of another width.
    """
    if not isinstance(unet, UNet2DConditionModel):
        kind = type(unet).__name__
        raise ConfigError(f"distil.embedding: a {kind} cannot be told a scale: leave it out")
    if (there := unet.config.time_cond_proj_dim) is not None:
        if there != width:
            raise ConfigError(
                f"distil.embedding {width}: that of the folder is {there} wide: leave this out"
            )
        return
    first = unet.time_embedding.linear_1
    told = nn.Linear(width, first.in_features, bias=False, device=first.weight.device)
    nn.init.zeros_(told.weight)
    unet.time_embedding.cond_proj = told
    unet.register_to_config(time_cond_proj_dim=width)


def guidance_told(unet: nn.Module, x_t: Tensor, cond: Condition) -> dict[str, Tensor]:
    """What ``unet`` is told of guidance beside the rest: nothing, unless it hears it. A condition
    that tells no scale is 1, none.
    """
    width = bare(unet).config.get("time_cond_proj_dim")
    if width is None:
        return {}
    scale = cond.extra.get(SCALE)
    scale = x_t.new_ones(len(x_t), dtype=torch.float64) if scale is None else scale
    return {"timestep_cond": guidance_embedding(scale, width).to(x_t.dtype)}


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sinusoids of 1,000 w, w = scale - 1, as stock pipelines tell a U-Net of it: ``b`` -> ``b
    width``, float32 (Meng et al. 2023; Luo et al. 2023, section 4.2).

    Args:
        scale: of guidance, float64: in float32 a thousandth of w would be another embedding.
        width: of the embedding.
    """
    w = (scale - 1).float() * 1000
    half = width // 2
    step = torch.tensor(10000.0, device=w.device).log() / (half - 1)
    angles = w[:, None] * torch.exp(torch.arange(half, device=w.device) * -step)[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


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


def inpainting(x_t: Tensor, cond: Condition) -> Tensor:
    """``x_t``, behind it what an inpainting U-Net is told of the picture (Rombach et al. 2022,
    section 4.5).
    """
    told = cond.extra.get(INPAINTED)
    return x_t if told is None else torch.cat([x_t, told.to(x_t)], 1)
