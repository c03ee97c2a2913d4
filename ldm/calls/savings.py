"""What diffusers' pipelines offer to save memory, or to change a U-Net, beside their call."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.loaders import IPAdapterMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin


class Savings(StableDiffusionMixin, IPAdapterMixin):
    """FreeU, fused projections and IP-Adapters as in diffusers, and its ``enable_vae_...``."""

    vae: Any
    family: Any

    encode_image = StableDiffusionPipeline.encode_image
    prepare_ip_adapter_image_embeds = StableDiffusionPipeline.prepare_ip_adapter_image_embeds

    def load_ip_adapter(self, *arguments: Any, **named: Any) -> None:
        """Puts IP-Adapters into the U-Net, as in diffusers; of files of tensors, which are
        safetensors.

        Raises:
            ValueError: the model has no place for one.
        """
        if not self.family.controlled:
            raise ValueError(f"a model of the family {self.family.name} takes no IP-Adapter")
        super().load_ip_adapter(*arguments, **named)

    def enable_vae_slicing(self) -> None:
        """Lets the autoencoder take one picture at a time."""
        self._own_vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Lets it take all at once again."""
        self._own_vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Lets the autoencoder take a large picture in tiles, which are blended."""
        self._own_vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Lets it take it whole again."""
        self._own_vae().disable_tiling()

    def _own_vae(self) -> Any:
        if self.vae is None:
            raise ValueError("this model has no autoencoder: its pictures are their own latents")
        return self.vae
