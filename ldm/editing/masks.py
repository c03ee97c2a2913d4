"""What of a picture is drawn and what is kept: masks of pixels and of latent cells, feathers, and
pictures of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad


def cells(drawn: Tensor, factor: int) -> Tensor:
    """1 of every latent cell of which a pixel is drawn: a mask ``n 1 h w`` of pixels ``n 1 height
    width``.

    A cell that is only in part behind the mask holds something of what is there, and is drawn as a
    whole; what of it lies before the mask is that of the input again when it is pasted.
    """
    return max_pool2d(drawn, factor)


def nearest_cells(drawn: Tensor, factor: int) -> Tensor:
    """The same as inpainting networks are told it, by one pixel of each cell, as in stock."""
    return interpolate(drawn, size=(drawn.shape[2] // factor, drawn.shape[3] // factor))


def feathered(drawn: Tensor, width: int) -> Tensor:
    """How much of what was drawn is seen, ``n 1 h w``: 1 behind the mask ``drawn``, and outside it
    less with every pixel of distance, 0 from more than ``width`` pixels on.
    """
    one = [_feathered(mask, width) for mask in drawn[:, 0].cpu().numpy() > 0]
    return torch.from_numpy(np.stack(one)[:, None]).to(drawn)


def filled(pixels: Tensor, drawn: Tensor) -> Tensor:
    """``pixels``, ``n c h w``, with the nearest that is known in place of each behind the mask
    ``drawn``, ``n 1 h w``: an encoder sees some way into a hole from outside, and what is in it
    must not colour what is known.
    """
    found = []
    for picture, mask in zip(pixels, drawn[:, 0].cpu().numpy() > 0, strict=True):
        if mask.all() or not mask.any():
            found.append(picture)
            continue
        rows, columns = distance_transform_edt(mask, return_distances=False, return_indices=True)
        found.append(picture[:, torch.from_numpy(rows), torch.from_numpy(columns)])
    return torch.stack(found)


def _feathered(mask: Any, width: int) -> Any:
    if not mask.any():  # nothing that there were a distance to
        return np.zeros(mask.shape, np.float32)
    distance = distance_transform_edt(~mask)
    return np.where(distance <= width, 1 - distance / (width + 1), 0).astype(np.float32)


def padded(x: Tensor, unit: int) -> Tensor:
    """``x``, ``n c h w``, its last row and column repeated until both sides are multiples of
    ``unit``.
    """
    height, width = x.shape[2:]
    return pad(x, (0, -width % unit, 0, -height % unit), mode="replicate")


def outpainted(
    image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """``image`` on a canvas that is larger by so many pixels, filled by its border, and the mask of
    what is to be drawn there: ``image`` and ``mask_image`` of a call.

    Raises:
        ValueError: a number is negative, or all are 0.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in sides.items():
        if pixels < 0:
            raise ValueError(f"{name} must be 0 pixels or more, not {pixels}")
    if not any(sides.values()):
        raise ValueError("outpainting by 0 pixels on every side: there is nothing to draw")
    around = ((top, bottom), (left, right))
    canvas = np.pad(np.asarray(image.convert("RGB")), (*around, (0, 0)), mode="edge")
    known = np.zeros((image.height, image.width), np.uint8)
    mask = np.pad(known, around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)
