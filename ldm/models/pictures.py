"""Pictures as a caller of a pipeline passes them -> pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

KINDS = (
    "a PIL picture, a tensor 3 h w or n 3 h w or an array h w 3 or n h w 3 in [-1, 1], or a list of"
    " these"
)


def pixels_of(image: Any) -> Tensor:
    """Pixels ``n 3 h w``, float, in [-1, 1], as diffusers' ``IFSuperResolutionPipeline`` reads
    them: numbers of tensors and arrays as they are.

    Raises:
        ValueError: it is no picture, or pictures of several sizes.
    """
    found = [_pixels(each) for each in (image if isinstance(image, (list, tuple)) else [image])]
    if not found or len({x.shape[-2:] for x in found}) != 1:
        raise ValueError("image: a list of pictures must hold some, all of one size")
    pixels = torch.cat(found)
    if not bool(pixels.isfinite().all()):
        raise ValueError("image: the picture holds nan or inf")
    return pixels


def _pixels(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1.0
    if isinstance(image, np.ndarray) and image.ndim in (3, 4):
        image = torch.from_numpy(image).movedim(-1, -3)
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"image must be {KINDS}")
    return image if image.ndim == 4 else image[None]
