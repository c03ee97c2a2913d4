"""What drawing and measuring need of a pipeline, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ldm.diffusion import Denoiser
from ldm.models.codec import Codec
from ldm.models.conditioner import Conditioner


class Pipe(Protocol):
    """A model that draws; ``ldm.pipeline.LatentDiffusionPipeline`` is one."""

    progress_bar: Any
    family: Any

    @property
    def network(self) -> Any:
        """What predicts, as its family calls it."""
        ...

    @property
    def codec(self) -> Codec:
        """What makes latents of pictures, and pictures of latents."""
        ...

    @property
    def conditioner(self) -> Conditioner:
        """What makes conditions of prompts."""
        ...

    @property
    def reads(self) -> Sequence[str] | None:
        """Names of classes, none of an unconditional model; None: text."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """The network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def __call__(self, prompt: Any, **settings: Any) -> Any:
        """Pictures of texts, in ``images``."""
        ...
