"""The fields of the YAML of training/train_classifier.py."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated

from pydantic import AfterValidator, Field

from ldm.config.loader import config_class
from ldm.config.noise import ProcessConfig, ProcessSettings
from ldm.config.schema import RunConfig
from ldm.config.shapes import Depth, Width, Widths


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


Expression = Annotated[str, AfterValidator(_expression)]


@config_class
class ClassifierShape:
    """A ``NoisyClassifier`` from random init.

    Args:
        block_out_channels: channels per resolution, each half the one before.
        layers_per_block: residual layers at each.
        norm_num_groups: groups of every GroupNorm.
    """

    block_out_channels: Widths = (64, 128, 160)
    layers_per_block: Depth = 1
    norm_num_groups: Width = 16


@config_class
class ClassifierConfig(RunConfig):
    """Training of a classifier of noised pictures.

    Args:
        labels: of each label a regular expression that first captions of its pictures contain;
            pictures that none or several fit are left out.
        model: pipeline folder whose latents it sees; None: pixels.
        process: the noise; what is left out is that of ``model``.
        classifier: the network.
    """

    labels: Annotated[dict[str, Expression], Field(min_length=2)]
    model: str | None = None
    process: ProcessConfig = field(default_factory=ProcessSettings)
    classifier: ClassifierShape = field(default_factory=ClassifierShape)
