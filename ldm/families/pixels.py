"""``pixels``: models without text, of classes or unconditional, as DDPM and DDIM are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.index import OF_OTHERS
from ldm.families.model import Family, Model
from ldm.families.unet import check_channels, described_unet
from ldm.models.conditioner import Conditioner
from ldm.models.labels import LabelConditioner
from ldm.models.wrapped import bare

_BY_SCHEDULER = {"DDIMScheduler": "DDIMPipeline", "DDPMScheduler": "DDPMPipeline"}


class Pixels(Family):
    """The label of a class beside the timestep, or nothing (Ho et al. 2020)."""

    name = "pixels"
    stock = ("DDIMPipeline", "DDPMPipeline")
    reads = UNet2DModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """No text tower at all."""
        return all(value is None for name, value in parts.items() if "text_encoder" in name)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``UNet2DModel``."""
        assert config.unet is not None
        target = model.target
        if config.unet.time_embedding == "fourier" and target != "score":
            raise ConfigError(
                "unet.time_embedding: without text the U-Net with Fourier features divides by"
                f" sigma, which makes a score and no {target!r}: use positional"
            )
        return described_unet(config, model, None)

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels and labels are those of the run."""
        check_channels(config, model, network)
        labels = len(model.classes) + 1 if model.classes else None
        if network.config.num_class_embeds != labels:
            raise ConfigError(
                f"the U-Net of {config.model} has {network.config.num_class_embeds or 'no'} labels,"
                f" condition makes {labels or 'none'}: classes, and one for no class"
            )

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """The label reaches the embedding of the timestep."""
        inside = bare(network)
        if inside.config.time_embedding_type == "fourier":
            # This one takes the logarithm of a sigma itself, and divides its output by it, so that
            # a score comes out. The process says log(sigma) / 4.
            timestep = (4 * timestep).exp()
        labels = cond.extra["label"] if inside.config.num_class_embeds else None
        return network(x_t, timestep, class_labels=labels).sample

    def conditioner(
        self,
        networks: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        classes: Sequence[str] | None = None,
        *,
        zeros: bool = False,
        length: int | None = None,
    ) -> Conditioner:
        """Names of classes -> labels."""
        return LabelConditioner(classes or ())

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``DDIMPipeline`` or ``DDPMPipeline``, after the scheduler. For models of classes,
        of latents or of other processes there is none, and they keep their name.
        """
        if index["vae"][0] is not None or index["classes"]:
            return {key: value for key, value in index.items() if key not in OF_OTHERS}
        name = _BY_SCHEDULER.get(index["scheduler"][1], index["_class_name"])
        kept = ["_diffusers_version", "unet", "scheduler"]
        return {"_class_name": name, **{key: index[key] for key in kept}}
