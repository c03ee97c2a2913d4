"""Pictures of any mode and size -> RGB tensors, square or of the shape of a bucket.

    flatten transparency onto a colour -> cut out the shape -> scale it (Lanczos)

What is random (crop, flip, augmentation) comes from a generator that is handed in. A picture that
fits already is not resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from ldm.data.buckets import Buckets
from ldm.data.depth import eight_bits
from ldm.data.ranges import Places, Side
from ldm.errors import DataError

if TYPE_CHECKING:  # the transform is its own config, which is read before torch is imported
    from torch import Tensor

Colour: TypeAlias = tuple[int, int, int]
Shape: TypeAlias = tuple[int, int]
"""Width and height in pixels."""


class View(NamedTuple):
    """What is drawn about how a picture is seen; by default nothing.

    Args:
        mirrored: left and right change places.
        place: where along its longer side it is cut, in [0, 1].
        colour: under transparent pixels, instead of the transform's background.
        shift: to the right and down, in pixels of the result.
    """

    mirrored: bool = False
    place: float = 0.5
    colour: Colour | None = None
    shift: tuple[int, int] = (0, 0)


PLAIN = View()


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture before a network sees it; the config *is* the transform.

    Args:
        size: side of the result in pixels; with ``buckets`` that of a square of their area.
        crop: which part of a picture that does not have the shape of the result.
        crops: a random crop is one of so many, evenly spaced from one end of the longer side to the
            other: then every result can be cached. Odd, since evaluation sees the one in the
            middle; None: it may lie anywhere.
        flip: mirror left and right half of the time.
        background: colour under transparent pixels and behind a shifted picture, 0 to 255.
        random_background: share of the pictures with transparency that are put onto a random colour
            instead (for autoencoders, which have no caption to contradict).
        random_shift: largest shift along each axis, in pixels of the result.
        buckets: shapes other than the square, by aspect ratio; None: all are cut to the square.
    """

    size: Side = 64
    crop: Literal["center", "random"] = "center"
    crops: Places | None = None
    flip: bool = False
    background: Colour = (255, 255, 255)
    random_background: float = 0.0
    random_shift: int = 0
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: a picture has at least one pixel")
        if self.crops is not None and self.crop == "center":
            raise ValueError(
                f"crops={self.crops}: only crop: random has several, set it or leave this"
            )
        if self.crops is not None and (self.crops < 3 or self.crops % 2 == 0):
            raise ValueError(f"crops={self.crops}: an odd number from 3 on has one in the middle")
        if not 0 <= self.random_background <= 1:
            raise ValueError(f"random_background={self.random_background} is not in [0, 1]")
        if not 0 <= self.random_shift < self.size:
            raise ValueError(f"random_shift={self.random_shift} is not in [0, size={self.size})")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background={self.background}: red, green and blue are 0 to 255")
        if self.buckets and not self.buckets.shapes(self.size):
            raise ValueError(f"size={self.size} is smaller than a step of the buckets")

    @property
    def deterministic(self) -> bool:
        """Whether every view is one of ``views``, which is what a latent cache needs."""
        anywhere = self.crop == "random" and self.crops is None
        return not anywhere and not self.random_background and not self.random_shift

    @cached_property
    def views(self) -> tuple[View, ...]:
        """All views of a picture if the transform is deterministic: each as likely as any other."""
        places = (0.5,) if self.crops is None else (n / (self.crops - 1) for n in range(self.crops))
        sides = (False, True) if self.flip else (False,)
        return tuple(View(mirrored=side, place=place) for place in places for side in sides)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """Width and height of the results of pictures of ``sizes`` (width and height, ``n 2``),
        int32 ``n 2``; 0 where a picture is too small for every bucket.
        """
        if self.buckets:
            return self.buckets.assign(sizes, self.size)
        return np.full((len(sizes), 2), self.size, np.int32)

    def view(self, draw: np.random.Generator | None) -> View:
        """A drawn view; ``draw`` None means evaluation: centred, straight, plain."""
        if draw is None:
            return View()
        # Every number is drawn whatever the settings, so that one setting does not move another's.
        mirror, where, plain, *rest = draw.random(8).tolist()
        red, green, blue = (int(256 * value) for value in rest[:3])
        x, y = (int(u * (2 * self.random_shift + 1)) - self.random_shift for u in rest[3:])
        return View(
            mirrored=self.flip and mirror < 0.5,
            place=self._place(where),
            colour=(red, green, blue) if plain < self.random_background else None,
            shift=(x, y),
        )

    def _place(self, where: float) -> float:
        if self.crop == "center":
            return 0.5
        return where if self.crops is None else int(where * self.crops) / (self.crops - 1)

    def __call__(
        self, image: Image.Image, view: View = PLAIN, shape: Shape | None = None
    ) -> Tensor:
        """Uint8 ``3 h w``; ``shape`` is width and height, by default the square."""
        background = self.background
        if view.colour and image.has_transparency_data:
            background = view.colour
        picture = _cover(flatten(image, background), shape or (self.size, self.size), view.place)
        if view.shift != (0, 0):
            canvas = Image.new("RGB", picture.size, background)
            canvas.paste(picture, view.shift)
            picture = canvas
        pixels = _tensor(picture)
        return pixels.flip(-1) if view.mirrored else pixels


def coordinates(size: Shape, view: View, shape: Shape) -> tuple[int, int, int, int, int, int]:
    """What a network may be told about a cut (Podell et al. 2023, section 2.2).

    Args:
        size: width and height of the picture, upright.
        view: how it is seen.
        shape: width and height of the result.

    Returns:
        Height and width of the picture; rows cut off above and columns cut off on the left once it
        is scaled; height and width of the result.
    """
    left, top, right, bottom = _box(size, shape, view.place)
    scale = shape[0] / (right - left)
    hidden = size[0] - right if view.mirrored else left
    return size[1], size[0], round(top * scale), round(hidden * scale), shape[1], shape[0]


def cuts(size: Shape, shape: Shape) -> bool:
    """Whether anything of a picture of ``size`` is cut away for a result of ``shape``."""
    return _box(size, shape, 0.0) != _box(size, shape, 1.0)


def flatten(image: Image.Image, background: Colour) -> Image.Image:
    """``image`` of any mode as 8-bit RGB, its transparent parts over ``background``.

    Raises:
        DataError: nothing says what white is, or Pillow cannot bring the mode to RGB (LAB).
    """
    image, _ = eight_bits(image, image)
    if image.mode == "LAB":  # Pillow takes it for what it is not
        raise DataError(f"pictures of mode {image.mode} are not read, save them as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    front = image.convert("RGBA")
    back = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(back, front).convert("RGB")


def _box(size: Shape, shape: Shape, place: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is cut out of ``size`` for a result of ``shape``."""
    (width, height), (wide, high) = size, shape
    across, down = min(width, height * wide / high), min(height, width * high / wide)
    if (across, down) == (wide, high):  # not resampled: whole pixels
        left, top = (min(int(place * (s + 1)), s) for s in (width - wide, height - high))
    else:
        left, top = place * (width - across), place * (height - down)
    return left, top, left + across, top + down


def _cover(image: Image.Image, shape: Shape, place: float) -> Image.Image:
    """``image`` scaled to cover ``shape``, ``place`` in [0, 1] along its longer side."""
    box = _box(image.size, shape, place)
    if (box[2] - box[0], box[3] - box[1]) == shape:
        left, top = int(box[0]), int(box[1])
        return image.crop((left, top, left + shape[0], top + shape[1]))
    # Cut before scaling: scaled first, a thin strip would become millions of pixels long.
    return image.resize(shape, Image.Resampling.LANCZOS, box=box)


def _tensor(image: Image.Image) -> Tensor:
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(picture: Tensor) -> Tensor:
    """Uint8 picture(s) of any shape as float32 in [-1, 1]."""
    return picture.float() / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """The inverse: pixels of any shape as uint8, those outside [-1, 1] at its ends."""
    import torch

    return ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """One picture ``3 h w`` in [-1, 1] as an 8-bit image."""
    return Image.fromarray(to_levels(pixels.cpu()).permute(1, 2, 0).numpy())
