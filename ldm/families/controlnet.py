"""The ControlNet that a run teaches beside the U-Net of its model."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel

from ldm.config.learning import CONTROLNET, ControlNet
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.model import Model
from ldm.families.networks import described, digest, initialised, on_meta, read

_CHANNELS = (16, 32, 96, 256)
_SAME = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type",
         "projection_class_embeddings_input_dim")  # fmt: skip


def put_in(model: Model, config: TrainConfig, *, meta: bool = False) -> None:
    """Puts the ControlNet that ``config`` describes, or names, beside the U-Net of ``model``.

    Raises:
        ConfigError: there is no place for it, or it is of another U-Net.
    """
    unet, settings = model.network, config.controlnet or ControlNet()
    if not model.family.controlled:
        raise ConfigError(
            f"train: a model of the family {model.family.name} can have no ControlNet: those of sd"
            " and sdxl can"
        )
    _check_unet(model, unet)
    if settings.folder is not None:
        network = read(ControlNetModel, settings.folder, "controlnet.folder", meta)
        _check_fit(settings.folder, network, unet, model.codec.factor)
        if not meta:
            model.origin["controlnet.folder"] = digest(network)
    else:
        channels = settings.channels or _usual(model.codec.factor)
        if (smaller := 2 ** (len(channels) - 1)) != model.codec.factor:
            raise ConfigError(
                f"controlnet.channels: {len(channels)} layers make a hint {smaller} times smaller,"
                f" and the autoencoder makes latents {model.codec.factor} times smaller"
            )

        def make() -> ControlNetModel:
            return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)

        with described("controlnet"):
            if meta:
                network = on_meta(make)
            else:
                with initialised(config.seed, CONTROLNET):
                    network = make()
    model.networks[CONTROLNET] = network


def _usual(factor: int) -> tuple[int, ...]:
    count = factor.bit_length()
    return (*_CHANNELS, *_CHANNELS[-1:] * count)[:count]


def _check_unet(model: Model, unet: Any) -> None:
    told = None
    if model.family.inpaints(unet):
        told = "inpaints"
    elif model.family.hears(unet):
        told = "is told its guidance"
    elif unet.config.time_embedding_type != "positional":
        told = "has random Fourier features of time"
    if told:
        raise ConfigError(f"train: the U-Net of this model {told}, and a ControlNet does not")


def _check_fit(folder: str, network: Any, unet: Any, factor: int) -> None:
    has = network.config
    for key in _SAME:
        mine, other = has.get(key), unet.config.get(key)
        if mine != other and [*_listed(mine)] != [*_listed(other)]:
            raise ConfigError(
                f"controlnet.folder: {folder} is of another U-Net: {key} {mine}, not {other}"
            )
    smaller = 2 ** (len(has.conditioning_embedding_out_channels) - 1)
    if smaller != factor:
        raise ConfigError(
            f"controlnet.folder: {folder} makes a hint {smaller} times smaller, and the autoencoder"
            f" makes latents {factor} times smaller"
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
