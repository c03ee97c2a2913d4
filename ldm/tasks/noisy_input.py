"""Pictures as a denoiser sees them, for networks that judge what is on its way to a picture.

    x = (alpha z + sigma eps) / sqrt(alpha^2 + sigma^2)

with z the latent, or the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config.noise import ProcessConfig, ProcessSettings
from ldm.data.images import ImageTransform
from ldm.diffusion import NoiseProcess, normal, stratified
from ldm.families.networks import digest, in_model
from ldm.families.noise import configured_process
from ldm.families.vae import latent_side, read_vae
from ldm.guidance import unit
from ldm.models.codec import Codec, VaeCodec


@dataclass(frozen=True)
class NoisyInput:
    """The noise, and what it is added to.

    Args:
        process: the noise.
        codec: frozen, of whose latents; None: pixels.
        shape: of what is noised, ``c h w``.
    """

    process: NoiseProcess
    codec: Codec | None
    shape: tuple[int, int, int]

    @staticmethod
    def of(
        model: str | None,
        images: ImageTransform,
        process: ProcessConfig | None = None,
        *,
        meta: bool = False,
    ) -> NoisyInput:
        """As the denoiser of the pipeline folder ``model`` sees squares of ``images``.

        Args:
            model: None: pixels.
            images: what makes them.
            process: what differs from the noise of ``model``, or all of it.
            meta: the autoencoder as shapes only.

        Raises:
            ConfigError: the folder cannot be read, or the size is not whole in latents.
        """
        settings = process or ProcessSettings()
        if model is None:
            return NoisyInput(
                configured_process(settings, None), None, (3, images.size, images.size)
            )
        vae = read_vae(str(in_model(model, "model", "vae")), meta=meta)
        codec = VaeCodec(vae.eval().requires_grad_(False))
        side = latent_side(codec, images)
        return NoisyInput(configured_process(settings, model), codec, (codec.channels, side, side))

    def origin(self) -> dict[str, Any]:
        """What a run's identity is told of it."""
        found = {"process": repr(self.process)}
        return found if self.codec is None else {**found, "model.vae": digest(self.codec.vae)}

    @property
    def networks(self) -> dict[str, Any]:
        """The autoencoder, if there is one, by the name of its folder."""
        return {} if self.codec is None else {"vae": self.codec.network}

    def example(self, n: int) -> dict[str, Tensor]:
        """``draws`` of ``n`` images, without values."""
        drawn = {name: torch.empty(n, *self.shape) for name in ("posterior", "noise")}
        return drawn | {"u": torch.empty(n, dtype=torch.float64)}

    def draws(self, seed: int, position: int, batch: int) -> dict[str, Any]:
        """All that is random of the image at ``position``: ``posterior``, ``noise``, ``u``."""
        return {
            "posterior": normal(seed, "posterior", position, self.shape),
            "noise": normal(seed, "noise", position, self.shape),
            "u": stratified(seed, "time", position // batch, batch)[position % batch],
        }

    def held_out(self, seed: int, number: int, k: int, levels: int) -> dict[str, Tensor]:
        """The same of held-out picture ``number`` in the middle of cell ``k`` of ``levels``."""
        return {
            "posterior": torch.zeros(self.shape),
            "noise": normal(seed, f"validation {k}", number, self.shape),
            "u": torch.tensor((k + 0.5) / levels, dtype=torch.float64),
        }

    def __call__(self, pixels: Tensor, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """X ``b c h w`` of ``pixels`` ``b 3 h w``, float32, and its timesteps ``b``."""
        z, u = pixels, draws["u"]
        if self.codec is not None:
            with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                z = self.codec.sample(self.codec.encode(pixels), draws["posterior"])
        t = self.process.time(u)
        x = unit(self.process.perturb(z, draws["noise"], t), self.process.level(t))
        return x, self.process.timestep(t).to(x)
