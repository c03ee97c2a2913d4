"""Autoencoders from a shape or from a folder."""

from __future__ import annotations

from diffusers import AutoencoderKL

from ldm.config.shapes import VaeShape
from ldm.data.images import ImageTransform
from ldm.errors import ConfigError
from ldm.families.networks import described, initialised, on_meta, read
from ldm.models.codec import Codec


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
            use_quant_conv=shape.quant_conv,
            use_post_quant_conv=shape.quant_conv,
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


def latent_side(codec: Codec, images: ImageTransform) -> int:
    """Side of the latent of a square picture; ``ConfigError`` if that of any shape is not whole."""
    key, value = ("buckets.step", images.buckets.step) if images.buckets else ("size", images.size)
    if value % codec.factor:
        raise ConfigError(
            f"images.{key} {value} is no multiple of {codec.factor}, the pixels of a latent"
        )
    return images.size // codec.factor
