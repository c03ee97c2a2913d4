"""What a run is made of, and what its folder holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.config.schema import Score, Validation
from ldm.diffusion import NoiseProcess, Objective, scheduler_config
from ldm.models.codec import Codec, codec_of
from ldm.models.conditioner import ClipConditioner, Conditioner
from ldm.models.labels import LabelConditioner
from ldm.sampling import SamplingDefaults, default_sampler


@dataclass
class Parts:
    """Everything a run is made of; networks in float32.

    ``origin`` tells what was read from folders, by the keys of a run's identity.
    """

    vae: AutoencoderKL | None  # None in pixel space
    tokenizer: CLIPTokenizer | None  # None on the meta device too
    text_encoder: CLIPTextModel | None  # None where no text is read
    unet: UNet2DConditionModel | UNet2DModel
    process: NoiseProcess
    objective: Objective
    origin: dict[str, Any] = field(default_factory=dict)
    # The folder whose vae, text_encoder and tokenizer these are, where the two networks are shapes
    # alone, on the meta device.
    stored: Path | None = None
    classes: tuple[str, ...] | None = None  # see ``ldm.families.reads.classes``
    # How the folder of ``model`` says that it is drawn, and how the run's own will.
    stated: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)

    def all(self) -> dict[str, nn.Module]:
        """The networks that there are, by name."""
        every = {"unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae}
        return {name: network for name, network in every.items() if network is not None}

    @property
    def codec(self) -> Codec:
        """What makes latents of pictures."""
        return codec_of(self.vae)

    @property
    def conditioner(self) -> Conditioner:
        """What makes conditions of captions."""
        if self.text_encoder is None:
            return LabelConditioner(self.classes or ())
        assert self.tokenizer is not None
        return ClipConditioner(self.tokenizer, self.text_encoder)

    def drawn_with(self, asked: Validation | Score) -> SamplingDefaults:
        """What ``asked`` gives, over what the folder of the model states, over the defaults."""
        named = SamplingDefaults(sampler=default_sampler(self.scheduler_config()))
        return named.but(**self.stated).but(**given(asked))

    def scheduler_config(self) -> dict[str, Any]:
        """What a saved folder says of noise and target."""
        learned = self.objective.learned_variance
        return scheduler_config(self.process, self.objective.target, learned_variance=learned)


def given(asked: Validation | Score) -> dict[str, Any]:
    """What a config says of drawing, by the arguments of ``SamplingDefaults``."""
    told = {
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        "sampler": asked.sampler,
    }
    return {name: value for name, value in told.items() if value is not None}
