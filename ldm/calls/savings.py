"""What diffusers' pipelines offer to save memory, or to change a U-Net, beside their call."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pipeline_utils import StableDiffusionMixin


class Savings(StableDiffusionMixin):
    """FreeU and fused projections as in diffusers, and its ``enable_vae_...``."""

    vae: Any

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
