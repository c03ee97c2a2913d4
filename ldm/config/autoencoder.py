"""The fields of the YAML of training/train_autoencoder.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm.config.loader import config_class
from ldm.config.schema import Pictures, RunConfig
from ldm.config.shapes import VaeShape


@config_class
class AutoencoderConfig(RunConfig):
    """Training of a KL autoencoder: L1 + gradient-L1 + KL.

    Args:
        vae: a shape for random init, or a folder to go on from.
        train: ``all``, or only the ``decoder`` (no latent changes).
        gradient: weight of the L1 distance between horizontal and vertical differences.
        kl: weight of the KL divergence to N(0, 1), in nats per latent number.
        fold_images: training pictures over which latent statistics are measured at the end.
    """

    vae: VaeShape | str
    train: Literal["all", "decoder"] = "all"
    gradient: Annotated[float, Field(ge=0)] = 0.5
    kl: Annotated[float, Field(ge=0)] = 1e-4
    fold_images: Pictures = 8192
