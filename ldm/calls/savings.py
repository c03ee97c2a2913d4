"""What diffusers' pipelines offer to save memory, or to change a U-Net, beside their call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.loaders import IPAdapterMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin

from ldm.formats.side_networks import ip_adapter


class Savings(StableDiffusionMixin, IPAdapterMixin):
    """FreeU, fused projections and IP-Adapters as in diffusers, and its ``enable_vae_...``."""

    vae: Any
    family: Any

    encode_image = StableDiffusionPipeline.encode_image
    prepare_ip_adapter_image_embeds = StableDiffusionPipeline.prepare_ip_adapter_image_embeds

    def load_ip_adapter(self, *arguments: Any, **named: Any) -> None:
        """Puts IP-Adapters into the U-Net, as in diffusers; of files of tensors, which are
        safetensors. Paths of files of this machine, or of folders that hold one, say enough alone;
        with ``weight_name`` they are diffusers'.

        Raises:
            OSError: there is no such file, or no picture tower beside it; the message is one line.
            ValueError: the model has no place for one, or they are none; likewise.
        """
        if not self.family.controlled:
            raise ValueError(f"a model of the family {self.family.name} takes no IP-Adapter")
        if len(arguments) != 1 or named:
            super().load_ip_adapter(*arguments, **named)
            return
        (given,) = arguments
        many = given if isinstance(given, (list, tuple)) else [given]
        read = [ip_adapter(Path(one)) for one in many]
        try:
            super().load_ip_adapter(**{name: [one[name] for one in read] for name in read[0]})
        except Exception as error:  # whatever diffusers, safetensors or torch raise
            line = " ".join(str(error).split())[:300] or type(error).__name__
            told = ", ".join(map(str, many))
            raise ValueError(f"{told} cannot be read as an IP-Adapter: {line}") from error

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
