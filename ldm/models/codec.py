"""Images <-> latents: an autoencoder, or nothing, behind the three calls that training and
sampling need.

    q(z | x) = N(mean(x), exp(logvar(x)));   latent = scaling_factor * (z - shift_factor)

(Rombach et al. 2022, section 3.1). Moments are what a cache stores: unscaled, so that the posterior
is sampled anew every epoch. In pixel space (Ho et al. 2020, section 3.3) x is its own latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

_PIXELS = 2**20
"""Decoded at a time: more is no faster, and takes gigabytes that the denoiser never needs."""
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


class Moments(NamedTuple):
    """Mean and log-variance of q(z | x), each ``b c h w``."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]


@runtime_checkable
class Codec(Protocol):
    """What makes latents of pictures and pictures of latents."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        ...

    @property
    def channels(self) -> int:
        """Latent channels."""
        ...

    @property
    def network(self) -> nn.Module | None:
        """What makes the latents; None where nothing does, and there is nothing to cache."""
        ...

    @property
    def part(self) -> str:
        """Folder of that network."""
        ...

    @property
    def printed(self) -> tuple[Any, ...]:
        """All that moments depend on beside pixels and network, with a repr that tells it."""
        ...

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of the latent of a picture of so many pixels."""
        ...

    def size(self, latent: Tensor) -> tuple[int, int]:
        """Height and width in pixels of the pictures of ``latent``."""
        ...

    def encode(self, pixels: Float[Tensor, "b 3 height width"]) -> Moments:
        """Moments of ``pixels`` in [-1, 1]."""
        ...

    def sample(self, moments: Moments, eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """One draw of the posterior as the denoiser sees it; ``eps`` is standard normal."""
        ...

    def decode(
        self, latent: Float[Tensor, "b c h w"], generators: Generators | None = None
    ) -> Float[Tensor, "b 3 height width"]:
        """Pixels in about [-1, 1], not clipped; ``generators`` are for decoders that draw noise."""
        ...


class IdentityCodec:
    """Pixels in [-1, 1] are the latent: a ``Codec`` of pixel space."""

    factor, channels, network, part, printed = 1, 3, None, "vae", ()

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """``3 height width``."""
        return 3, height, width

    def size(self, latent: Tensor) -> tuple[int, int]:
        """Those of the latent."""
        return latent.shape[-2], latent.shape[-1]

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Moments:
        """``pixels`` without variance."""
        return Moments(pixels, torch.full_like(pixels, -torch.inf))

    def sample(self, moments: Moments, eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The pixels, whatever ``eps``."""
        return moments.mean

    def decode(
        self, latent: Float[Tensor, "b 3 h w"], generators: Generators | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """The latent."""
        return latent


class VaeCodec:
    """``AutoencoderKL`` as a ``Codec``, or what a pipeline has in its place: ``AutoencoderTiny``,
    ``AsymmetricAutoencoderKL``, ``ConsistencyDecoderVAE``.

    Args:
        vae: the autoencoder; its ``scaling_factor`` (and ``shift_factor``) are applied here and
            nowhere else.
    """

    part, printed = "vae", ()

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side (8 for "f8")."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.vae.config.latent_channels

    @property
    def network(self) -> nn.Module:
        """The autoencoder."""
        return self.vae

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """``c h w``; what is no whole cell is left out."""
        return self.channels, height // self.factor, width // self.factor

    def size(self, latent: Tensor) -> tuple[int, int]:
        """Those of the latent, ``factor`` times as large."""
        return latent.shape[-2] * self.factor, latent.shape[-1] * self.factor

    def encode(self, pixels: Float[Tensor, "b 3 height width"]) -> Moments:
        """Moments of ``pixels``, ``b 3 h w`` in [-1, 1], in the dtype of the autoencoder."""
        found = self.vae.encode(pixels.to(self.vae.dtype))
        if hasattr(found, "latent_dist"):
            return Moments(found.latent_dist.mean, found.latent_dist.logvar)
        return Moments(found.latents, torch.full_like(found.latents, -torch.inf))

    def sample(self, moments: Moments, eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """One draw of the posterior as the denoiser sees it; ``eps`` is standard normal, ``b c h
        w``.
        """
        z = moments.mean + (0.5 * moments.logvar).exp() * eps
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(
        self, latent: Float[Tensor, "b c h w"], generators: Generators | None = None
    ) -> Float[Tensor, "b 3 height width"]:
        """Pixels in about [-1, 1], ``b 3 h w``, not clipped, of latents as the denoiser sees
        them.
        """
        z = latent / self.vae.config.scaling_factor + self._shift
        # Its dtype alone: an offloaded autoencoder comes to the latent's device when it is called.
        z = z.to(self.vae.dtype)
        if generators is not None and hasattr(self.vae, "decoder_scheduler"):
            return self.vae.decode(z, generator=generators).sample
        height, width = self.size(z)
        at_once = max(1, _PIXELS // (height * width))
        parts = [self.vae.decode(part).sample for part in z.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0


def codec_of(vae: Any) -> Codec:
    """The codec of a model with this autoencoder; None is pixel space."""
    return IdentityCodec() if vae is None else VaeCodec(vae)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Makes latents of per-channel ``mean`` and ``std`` (each ``c``) come out with mean 0 and std
    1.

    The statistics are folded into the quant and post-quant convolutions, so that the reconstruction
    stays what it was, ``scaling_factor`` is 1 and there is no shift: stock pipelines need nothing
    new. ``ValueError`` if the autoencoder lacks the two.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    if quant is None or post is None:
        raise ValueError("the autoencoder has no quant convolutions to fold statistics into")
    mean, std = mean.to(quant.weight), std.to(quant.weight)
    channels = len(mean)
    # Encoder: (mean_c - m_c) / s_c, and log-variance - 2 log s_c.
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    # Decoder: W (s z + m) + b.
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)
