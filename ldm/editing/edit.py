"""What a call makes of a picture: where on the way from noise it sets out, and what it keeps.

    x_t = alpha x0 + sigma eps,   x0 = encode(picture),   t as far from data as ``strength`` says

(Meng et al. 2022, SDEdit.) With a mask x0 is replaced by what is known at every step
(``ldm.guidance.replacement``), and what was drawn is pasted into the picture at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.editing.masks import feathered, padded
from ldm.editing.pictures import masks, numbers, pictures, resized, size
from ldm.models.codec import Codec, Generators, Moments

STRENGTH = 0.75
"""Where there is no mask and nothing is asked for; with one it is 1."""


@dataclass(frozen=True)
class Edit:
    """A picture, or several, that a call sets out from; without any it draws from noise.

    Args:
        pixels: ``k 3 h w`` in [-1, 1], the sides multiples of what the model draws.
        latents: ``k c h w`` in place of pixels.
        drawn: the mask, 1 where a picture is drawn, 0 where it is kept, ``k 1 h w``; None: all is
            drawn.
        strength: share of the way from noise that is gone: 0 none, 1 all.
        seen: the same as ``drawn``, feathered.
        cut: height and width of what comes back.
    """

    pixels: Tensor | None = None
    latents: Tensor | None = None
    drawn: Tensor | None = None
    strength: float = 1.0
    seen: Tensor | None = None
    cut: tuple[int, int] | None = None

    @classmethod
    def asked(
        cls,
        image: Any,
        mask_image: Any,
        strength: float | None,
        feather: int | None,
        *,
        height: int | None,
        width: int | None,
        codec: Codec,
        unit: int,
    ) -> Edit:
        """What the arguments of these names of a call say.

        Args:
            image: of ``ldm.editing.pictures.KINDS``, or latents ``n c h w``; None: no edit.
            mask_image: the same; what is white, or 0.5 or more, is drawn.
            strength: None: ``STRENGTH``, or with a mask 1.
            feather: pixels; None: a latent cell.
            height: of the result; None: of the picture, without a mask cut to a multiple of
                ``unit`` as in stock, with one to the pixel.
            width: likewise.
            codec: from latents to pixels.
            unit: pixels of which the sides of what a model draws are multiples.

        Raises:
            ValueError: they do not go together, or are of the wrong shape or range.
        """
        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if image is None and value is not None:
                raise ValueError(f"{name} needs an image: the picture that is edited")
        if feather is not None and mask_image is None:
            raise ValueError("feather is that of a mask_image, and there is none")
        if image is None:
            return cls()
        given = 1.0 if mask_image is not None else STRENGTH
        strength = given if strength is None else strength
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], not {strength:g}")
        if isinstance(image, Tensor) and _are_latents(image, codec):
            if mask_image is not None:
                raise ValueError("mask_image is that of pixels, and image are latents")
            return cls(latents=image, strength=strength)
        found = pictures("image", image)
        if isinstance(found, list) and mask_image is not None and height is None and width is None:
            if len({one.size for one in found}) > 1:
                raise ValueError("image: pictures of several sizes: pass height and width")
        own = size(found)
        if mask_image is None:
            own = own[0] - own[0] % unit, own[1] - own[1] % unit
        sides = own[0] if height is None else height, own[1] if width is None else width
        if 0 in sides:
            rows, columns = size(found)
            raise ValueError(f"image: {columns} x {rows} pixels are too few, sides have {unit}")
        pixels = 2 * resized(found, *sides) - 1
        if mask_image is None:
            return cls(pixels, strength=strength)
        drawn = (resized(masks("mask_image", mask_image), *sides) >= 0.5).float()
        many = max(len(drawn), len(pixels))
        if len(drawn) not in (1, many) or len(pixels) not in (1, many):
            raise ValueError(f"mask_image: {len(drawn)} masks for {len(pixels)} pictures")
        if feather is None:
            feather = codec.factor if codec.factor > 1 else 0
        if feather < 0:
            raise ValueError(f"feather must be 0 pixels or more, not {feather}")
        every = (padded(x, unit) for x in (pixels, drawn, feathered(drawn, feather)))
        pixels, drawn, seen = (x.expand(many, -1, -1, -1) for x in every)
        return cls(pixels, None, drawn, strength, seen, sides)

    def numbers(self, prompts: int, each: int) -> list[int]:
        """Which of the pictures those of a call set out from, ``each`` of every prompt.

        Raises:
            ValueError: there is neither one, nor one a prompt, nor one for each.
        """
        given = self.latents if self.pixels is None else self.pixels
        return numbers("image", 1 if given is None else len(given), prompts, each)

    def taken(self, count: Callable[[int, float], int], steps: int) -> int:
        """Steps that are taken of so many, as (steps, strength) are ``count``ed.

        Raises:
            ValueError: there is none, though something is asked for.
        """
        found = count(steps, self.strength)
        if self.strength > 0 and found == 0:
            raise ValueError(
                f"strength {self.strength:g} of {steps} steps is less than one step: nothing is"
                " drawn; use more steps, or 0 for what the autoencoder makes of the picture"
            )
        return found

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width in pixels of what is drawn; None: the picture, if any, says none."""
        return None if self.pixels is None else (self.pixels.shape[2], self.pixels.shape[3])

    def pasted(self, made: Tensor, each: Sequence[int]) -> Tensor:
        """Pixels ``made``, ``b 3 h w`` in [-1, 1], seen through the mask in the pictures numbered
        ``each``, and cut to their size; as they are without a mask.
        """
        if self.pixels is None or self.seen is None or self.cut is None:
            return made
        seen, pixels = (part[list(each)].to(made) for part in (self.seen, self.pixels))
        # Not only weighed: 0 times what is not finite is no 0, and a rounded pixel not the same.
        mixed = torch.where(seen == 1, made, seen * made + (1 - seen) * pixels)
        height, width = self.cut
        return torch.where(seen > 0, mixed, pixels)[..., :height, :width]


def encoded(
    codec: Codec,
    pixels: Tensor,
    numbers: Sequence[int],
    generators: Generators | None,
    device: torch.device,
) -> Tensor:
    """Draws latents ``n c h w`` of ``pixels``, ``k 3 h w`` in [-1, 1], as stock does: one of each
    picture, or where every generator draws one picture one for each of ``numbers``.
    """
    found = [codec.encode(one[None].to(device)) for one in pixels]  # alone: the same in any batch
    moments = Moments(*(torch.cat(part).float() for part in zip(*found, strict=True)))
    which = list(numbers)
    if bool(moments.logvar.isneginf().all()):
        return codec.sample(moments, torch.zeros_like(moments.mean))[which]
    alone = isinstance(generators, Sequence)
    if alone:
        moments = Moments(*(part[which] for part in moments))
    shape = tuple(moments.mean.shape)
    draws = list(generators) if isinstance(generators, Sequence) else generators
    latents = codec.sample(moments, randn_tensor(shape, draws, device, torch.float32))
    return latents if alone else latents[which]


def _are_latents(image: Tensor, codec: Codec) -> bool:
    """Whether they are no pixels, by the number of channels."""
    return image.ndim == 4 and image.shape[1] == codec.channels != 3
