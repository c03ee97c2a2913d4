"""Pictures of any mode and size -> square RGB tensors.

    flatten transparency onto a colour -> cut out a square -> scale it to ``size`` (Lanczos)

What is random (crop, flip, augmentation) comes from a generator that is handed in. A picture that
fits already is not resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.source import DataError

Colour: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture before a network sees it; the config *is* the transform.

    Args:
        size: side of the result in pixels.
        crop: which square of a picture that is not square.
        flip: mirror left and right half of the time.
        background: colour under transparent pixels and behind a shifted picture, 0 to 255.
        random_background: share of the pictures with transparency that are put onto a random colour
            instead (for autoencoders, which have no caption to contradict).
        random_shift: largest shift along each axis, in pixels of the result.
    """

    size: int = 64
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    background: Colour = (255, 255, 255)
    random_background: float = 0.0
    random_shift: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: a picture has at least one pixel")
        if not 0 <= self.random_background <= 1:
            raise ValueError(f"random_background={self.random_background} is not in [0, 1]")
        if not 0 <= self.random_shift < self.size:
            raise ValueError(f"random_shift={self.random_shift} is not in [0, size={self.size})")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background={self.background}: red, green and blue are 0 to 255")

    @property
    def deterministic(self) -> bool:
        """Whether every result is one of ``variants``, which is what a latent cache needs."""
        return self.crop == "center" and not self.random_background and not self.random_shift

    @property
    def variants(self) -> int:
        """Number of results that a picture has if the transform is deterministic: 2 with flips."""
        return 2 if self.flip else 1

    def apply(self, image: Image.Image, variant: int) -> Tensor:
        """Result without augmentation, uint8 ``3 size size``: 0 straight, 1 mirrored."""
        pixels = _tensor(_square(flatten(image, self.background), self.size, 0.5))
        return pixels.flip(-1) if variant else pixels

    def __call__(self, image: Image.Image, draw: np.random.Generator | None) -> Tensor:
        """Uint8 ``3 size size``; ``draw`` None means evaluation: centred, straight, plain."""
        if draw is None:
            return self.apply(image, 0)
        # Every number is drawn whatever the settings, so that one setting does not move another's.
        mirror, where, plain, *rest = draw.random(8).tolist()
        colour, shift = rest[:3], rest[3:]
        background = self.background
        if plain < self.random_background and image.has_transparency_data:
            red, green, blue = (int(256 * value) for value in colour)
            background = (red, green, blue)
        place = where if self.crop == "random" else 0.5
        picture = _square(flatten(image, background), self.size, place)
        if self.random_shift:
            x, y = (int(u * (2 * self.random_shift + 1)) - self.random_shift for u in shift)
            canvas = Image.new("RGB", picture.size, background)
            canvas.paste(picture, (x, y))
            picture = canvas
        pixels = _tensor(picture)
        return pixels.flip(-1) if self.flip and mirror < 0.5 else pixels


def flatten(image: Image.Image, background: Colour) -> Image.Image:
    """``image`` of any mode as 8-bit RGB, its transparent parts over ``background``.

    Grey values of 16 bits are scaled to 8; Pillow alone would clip them.

    Raises:
        DataError: Pillow cannot bring the mode to RGB (LAB).
    """
    if image.mode.startswith("I"):  # PNGs and TIFFs of 16 bits, which some Pillows open as 32
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("LAB", "La"):  # Pillow takes these for what they are not
        raise DataError(f"pictures of mode {image.mode} are not read, save them as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    front = image.convert("RGBA")
    back = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(back, front).convert("RGB")


def _square(image: Image.Image, size: int, place: float) -> Image.Image:
    """The square that covers ``image``, ``place`` in [0, 1] along its longer side, at ``size``."""
    side = min(image.size)
    spare_x, spare_y = image.width - side, image.height - side
    if side == size:
        left, top = (min(int(place * (spare + 1)), spare) for spare in (spare_x, spare_y))
        return image.crop((left, top, left + size, top + size))
    left, top = place * spare_x, place * spare_y
    # Cut before scaling: scaled first, a thin strip would become millions of pixels long.
    return image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(picture: Tensor) -> Tensor:
    """Uint8 picture(s) of any shape as float32 in [-1, 1]."""
    return picture.float() / 127.5 - 1
