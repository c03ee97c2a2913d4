"""What families of rectified flows on transformers adapt and refuse alike."""

from __future__ import annotations

import dataclasses

from ldm.config.schema import MmditShape, TrainConfig
from ldm.diffusion import RectifiedFlow
from ldm.errors import ConfigError
from ldm.families.model import Model

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""What names of modules end in that are the attention of both streams."""
LONGEST = 512
"""Tokens of a T5 that a call asks for at most, as in stock."""


def check_run(config: TrainConfig, model: Model, patch: int, positions: int | None = None) -> None:
    """``ConfigError`` for a run that no network of the family can do.

    Args:
        config: the run.
        model: of which the network will be.
        patch: latent cells along each side of a token.
        positions: tokens along each side of the largest picture; None: any number.
    """
    name = model.family.name
    if not isinstance(model.process, RectifiedFlow):
        raise ConfigError(
            f"process: a model of the family {name} is a rectified flow: set process.kind to"
            " rectified_flow and objective.target to velocity"
        )
    if config.dropout is not None:
        raise ConfigError(f"dropout: the transformer of the family {name} has none: leave it out")
    images, unit = config.images, model.codec.factor * patch
    buckets = images.buckets
    key, value = ("buckets.step", buckets.step) if buckets else ("size", images.size)
    if value % unit:
        raise ConfigError(f"images.{key} {value} is no multiple of {unit}, the pixels of a token")
    shapes = buckets.shapes(images.size) if buckets else [(images.size, images.size)]
    side = max(max(shape) for shape in shapes)
    if positions is not None and side > positions * unit:
        raise ConfigError(
            f"images: {side} pixels are more than the {positions * unit} that the transformer has"
            " positions for: set transformer.positions, or leave out such pictures"
        )


def left_out(shape: MmditShape, name: str, *keys: str) -> None:
    """``ConfigError`` where one of ``keys`` of ``shape`` is given that the family ``name`` does not
    know.
    """
    for field in dataclasses.fields(MmditShape):
        if field.name in keys and getattr(shape, field.name) != field.default:
            raise ConfigError(
                f"transformer.{field.name}: the transformer of the family {name} has no choice of"
                " it: leave it out"
            )


def taken(steps: int, strength: float) -> int:
    """How many of so many steps the stock pipelines of both take from a picture: ``steps *
    strength``, rounded up.
    """
    return steps - int(steps - steps * strength)
