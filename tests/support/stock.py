"""What comparisons of ours with stock pipelines share: quiet pipelines, draws, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def apart(one: Any, other: Any) -> float:
    """The largest difference of pictures that show something, in units of the largest number."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape and one.std() > 0.05
    return float(np.abs(one - other).max() / np.abs(other).max())


def scheduled(parts: dict[str, Any], kind: type) -> dict[str, Any]:
    """``parts`` with a scheduler of another kind."""
    return parts | {"scheduler": kind.from_config(parts["scheduler"].config)}
