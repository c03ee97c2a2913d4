"""Small things in large pictures: what lies around a mask is cut out, drawn at the size that the
model draws well, and put back ("only masked" of A1111, ``padding_mask_crop`` of diffusers).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ldm.editing.masks import feathered
from ldm.editing.pictures import numbers

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

_RESIZER = VaeImageProcessor(vae_scale_factor=1)
_DRAWN = 128  # and more of 255: as half and more of 1 is


def close_up(
    pipe: Any,
    prompt: str | list[str],
    *,
    image: Any,
    mask_image: Any,
    padding_mask_crop: int,
    feather: int | None = None,
    height: int | None = None,
    width: int | None = None,
    **call: Any,
) -> Any:
    """What the call of ``pipe`` returns of pictures of which the part around the mask alone is
    drawn, at ``height`` and ``width``, and put back at its size; the rest stays to the byte.

    Args:
        pipe: the pipeline.
        prompt: see its call; of what the part shows.
        image: PIL, or several.
        mask_image: PIL, or several.
        padding_mask_crop: pixels of the picture around the mask that the model sees.
        feather: pixels of the picture outside the mask on which what is drawn fades into it; None:
            a latent cell, as large as it lies there.
        height: in pixels, of what is drawn; None: what the model draws where nothing is asked for.
        width: likewise.
        call: further arguments.

    Raises:
        ValueError: an argument does not go with these.
    """
    pictures = [one.convert("RGB") for one in _several("image", image)]
    masks = [
        one.convert("L").point(lambda value: 255 if value >= _DRAWN else 0)
        for one in _several("mask_image", mask_image)
    ]
    if call.get("output_type", "pil") != "pil":
        raise ValueError("padding_mask_crop gives PIL images: leave out output_type")
    if feather is not None and feather < 0:
        raise ValueError(f"feather must be 0 pixels or more, not {feather}")
    height, width = _sides(pipe, height, width)
    many = max(len(pictures), len(masks))
    if not {len(pictures), len(masks)} <= {1, many}:
        raise ValueError(f"mask_image: {len(masks)} masks for {len(pictures)} pictures")
    pictures, masks = (own * (many if len(own) == 1 else 1) for own in (pictures, masks))
    for photo, mask in zip(pictures, masks, strict=True):
        if photo.size != mask.size:
            raise ValueError(
                f"mask_image has {mask.width} x {mask.height} pixels and its picture"
                f" {photo.width} x {photo.height}: with padding_mask_crop they must be alike"
            )
    boxes = [_box(mask, height, width, padding_mask_crop) for mask in masks]
    parts, holes = (
        [_RESIZER.resize(one.crop(box), height, width, "fill") for one, box in pairs]
        for pairs in (zip(pictures, boxes, strict=True), zip(masks, boxes, strict=True))
    )
    told = {"image": parts, "mask_image": holes, "height": height, "width": width}
    found = pipe(prompt, **call | told)
    made = found[0] if isinstance(found, tuple) else found.images
    texts = prompt if isinstance(prompt, list) else call.get("prompt_embeds")
    prompts, each = 1 if texts is None else len(texts), call.get("num_images_per_prompt", 1)
    cell = pipe.codec.factor if pipe.codec.factor > 1 else 0
    every = numbers("image", many, prompts, each)
    for n, which in enumerate(every[: len(made)]):  # of the batches that nobody interrupted
        box = boxes[which]
        seen = round(cell * max(1.0, (box[2] - box[0]) / width)) if feather is None else feather
        made[n] = put_back(pictures[which], masks[which], box, made[n], seen)
    return found


def put_back(
    photo: Image.Image, mask: Image.Image, box: Box, made: Image.Image, feather: int
) -> Image.Image:
    """``photo`` with ``made``, resized to ``box``, seen in it through ``mask``, and less with every
    pixel of distance from it up to ``feather``.
    """
    left, top, right, bottom = box
    size = bottom - top, right - left
    drawn = np.asarray(_RESIZER.resize(made.convert("RGB"), *size, "crop"), np.float32)
    hole = torch.from_numpy(np.asarray(mask.crop(box)) > 0)[None, None].float()
    seen = feathered(hole, feather)[0, 0, :, :, None].numpy()
    found = np.array(photo)
    part = found[top:bottom, left:right]
    mixed = np.rint(seen * drawn + (1 - seen) * part).astype(np.uint8)
    found[top:bottom, left:right] = np.where(seen > 0, mixed, part)
    return Image.fromarray(found)


def _box(mask: Image.Image, height: int, width: int, padding: int) -> Box:
    """What is cut out: of the shape ``height`` x ``width`` where the picture has room for it."""
    if mask.getbbox() is None:  # nothing is drawn, wherever it is
        return 0, 0, mask.width, mask.height
    return VaeImageProcessor.get_crop_region(mask, width, height, padding)


def _sides(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    own = pipe.family.side(pipe.network)
    usual = own if isinstance(own, (tuple, list)) else (own, own)
    found = [
        side if side is not None or cells is None else cells * pipe.codec.factor
        for side, cells in zip((height, width), usual, strict=True)
    ]
    rows, columns = found
    if rows is None or columns is None:
        raise ValueError("this model states no size: pass height and width of what is drawn")
    return rows, columns


def _several(name: str, value: Any) -> list[Image.Image]:
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    if not many or not all(isinstance(one, Image.Image) for one in many):
        raise ValueError(f"padding_mask_crop needs {name}: a PIL image, or a list of them")
    return many
