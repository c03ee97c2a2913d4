"""Pictures and masks that a call is given, whatever they are kept in, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

KINDS = "a PIL image, an array h w 3, a tensor 3 h w, or several of one kind"


def is_picture(value: Any) -> bool:
    """Whether ``value`` is of one of the ``KINDS``, whatever is in it."""
    one = (Image.Image, np.ndarray, Tensor)
    if isinstance(value, (list, tuple)):
        return any(value and all(isinstance(each, kind) for each in value) for kind in one)
    return isinstance(value, one)


def pictures(name: str, value: Any) -> list[Image.Image] | Tensor:
    """``value``, of one of the ``KINDS``, as PIL images in RGB or as a tensor ``n 3 h w`` in
    [0, 1]. Arrays are bytes or in [0, 1]; a tensor in [-1, 1] is taken too, as in stock. How
    transparent a PIL image is is left out.

    Raises:
        ValueError: it has another shape, or other values.
    """
    if isinstance(images := _images(value), list):
        return [image.convert("RGB") for image in images]
    return _in_range(name, _tensor(name, images, 3, "h w 3", "3 h w"))


def masks(name: str, value: Any) -> list[Image.Image] | Tensor:
    """``value`` as gray PIL images or as a tensor ``n 1 h w`` in [0, 1]; shapes also without the
    axis of the channel.

    Raises:
        ValueError: it has another shape, or other values.
    """
    if isinstance(images := _images(value), list):
        return [image.convert("L") for image in images]
    many = images if isinstance(images, Sequence) else [images]
    channel = -1 if isinstance(many[0], np.ndarray) else 0
    if all(each.ndim == 2 for each in many):
        images = [each[..., None] if channel else each[None] for each in many]
    elif len(many) == 1 and many[0].ndim == 3 and many[0].shape[channel] != 1:
        images = many[0][..., None] if channel else many[0][:, None]
    return _in_range(name, _tensor(name, images, 1, "h w", "h w"))


def numbers(name: str, many: int, prompts: int, each: int) -> list[int]:
    """Which of ``many`` pictures of the argument ``name`` those of a call go with, ``each`` of
    every prompt.

    Raises:
        ValueError: there is neither one, nor one a prompt, nor one for each.
    """
    count = prompts * each
    if many not in (1, prompts, count):
        raise ValueError(
            f"{name}: {many} pictures for {prompts} prompts of {each} pictures each: pass one"
            " for all, one a prompt or one for each"
        )
    if many == 1:
        return [0] * count
    return [n if many == count else n // each for n in range(count)]


def size(found: list[Image.Image] | Tensor) -> tuple[int, int]:
    """Height and width of the first."""
    if isinstance(found, list):
        return found[0].height, found[0].width
    return found.shape[2], found.shape[3]


def resized(found: list[Image.Image] | Tensor, height: int, width: int) -> Tensor:
    """``n c h w`` in [0, 1], resized as stock does it: PIL images by Lanczos' filter, tensors to
    the nearest pixel.
    """
    gray = isinstance(found, list) and found[0].mode == "L"
    resizer = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_convert_grayscale=gray, vae_latent_channels=0
    )
    return resizer.preprocess(found, height, width)


def _images(value: Any) -> Any:
    """PIL images as a list of them, anything else as it is; a list of one is that one."""
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return many if isinstance(many[0], Image.Image) else (many if len(many) > 1 else many[0])


def _tensor(name: str, value: Any, channels: int, array: str, tensor: str) -> Tensor:
    many = value if isinstance(value, list) else [value]
    told = array if isinstance(many[0], np.ndarray) else tensor
    found = [_channels_first(each) for each in many]
    for each in found:
        if each.ndim != 4 or each.shape[1] != channels or 0 in each.shape:
            raise ValueError(f"{name} must be {told}, or n of them, not {tuple(many[0].shape)}")
    if len({each.shape[2:] for each in found}) > 1:
        raise ValueError(f"{name}: all must be of one size, or PIL images")
    return torch.cat(found)


def _channels_first(one: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """``n c h w``, float32; bytes divided by 255."""
    array = isinstance(one, np.ndarray)
    x = torch.from_numpy(np.array(one)) if isinstance(one, np.ndarray) else one
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    x = x if x.ndim == 4 else x[None]
    return x.movedim(-1, 1) if array and x.ndim == 4 else x


def _in_range(name: str, x: Tensor) -> Tensor:
    least, most = (float(end) for end in x.aminmax())
    if not (-1 <= least and most <= 1):
        raise ValueError(
            f"{name} must hold bytes or numbers in [0, 1], not from {least:g} to {most:g}"
        )
    return (x + 1) / 2 if least < 0 else x
