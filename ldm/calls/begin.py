"""What a call draws from: noise, or pictures with as much of it as is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.calls.arguments import Pictures, part
from ldm.calls.control import Control
from ldm.editing.edit import Edit, encoded
from ldm.editing.masks import cells, filled, nearest_cells
from ldm.editing.seeds import varied
from ldm.families import INPAINTED, Family
from ldm.guidance import Replacement
from ldm.models.codec import Codec
from ldm.models.wrapped import bare


@dataclass(frozen=True)
class Begin:
    """The beginning of a call, of all of its pictures.

    Args:
        noise: standard normal, or latents to go on from, ``n c h w``.
        shares: between which of the noise it draws, ``denoising_start`` and ``denoising_end``.
        edit: pictures that it sets out from.
        numbers: which of those each is of.
        known: their latents, ``n c h w``, where they are needed.
        drawn: 1 of cells that are drawn, where some are kept, ``n 1 h w``.
        beside: what the network is told of every picture by itself, ``n ...``.
        unsaid: what guidance steers away from in its place.
    """

    noise: Tensor
    shares: tuple[float, float] = (0.0, 1.0)
    edit: Edit = field(default_factory=Edit)
    numbers: Sequence[int] = ()
    known: Tensor | None = None
    drawn: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    unsaid: dict[str, Tensor] = field(default_factory=dict)

    def x(self, noised: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Where a walk sets out that has made (latents, noise) ``noised``. From noise alone that is
        what it is without a picture, to the bit; what is kept has its mean there too, unlike in
        stock.
        """
        if self.known is None:
            return self.noise
        if self.edit.strength < 1:
            return noised(self.known, self.noise)
        if self.drawn is None:
            return self.noise
        return torch.where(self.drawn > 0, self.noise, noised(self.known, self.noise))

    def kept(self, part: slice) -> Replacement | None:
        """What leaves the rest of the pictures of a batch as it is."""
        if self.known is None or self.drawn is None:
            return None
        return Replacement(self.known[part], self.drawn[part])

    def pasted(self, made: Tensor, part: slice) -> Tensor:
        """The pixels ``made`` of a batch in their pictures."""
        return self.edit.pasted(made, self.numbers[part])


@dataclass(frozen=True)
class Asked:
    """Arguments of a call that say what it draws from, by its names for them; ``told`` are the
    further ones, which a family takes its own from, and ``control`` what ControlNets are told.
    """

    height: int | None
    width: int | None
    latents: Tensor | None
    image: Any
    mask_image: Any
    strength: float | None
    feather: int | None
    denoising_start: float | None
    denoising_end: float | None
    told: dict[str, Any] = field(default_factory=dict)
    control: Control = field(default_factory=Control)


def begun(
    pictures: Pictures,
    family: Family,
    parts: Mapping[str, Any],
    codec: Codec,
    device: torch.device,
    asked: Asked,
) -> Begin:
    """The beginning of a call.

    Generators draw what stock draws, in its order: the latents of the pictures, the noise, and the
    latents of what an inpainting network is told, or the noise of a picture that is enlarged. At a
    strength of 1 the noise comes first, as it does without a picture.

    Args:
        pictures: those that it draws.
        family: of the model.
        parts: of the pipeline, by name.
        codec: from latents to pixels.
        device: where the network is.
        asked: what it is to draw from.

    Raises:
        ValueError: what is asked for does not go together, there are no pictures of this size or
            number, or the network cannot draw them.
    """
    network = bare(parts[family.network])
    how = {name: getattr(asked, name) for name in ("mask_image", "strength", "feather")}
    height, width, image = asked.height, asked.width, asked.image
    if family.shown(network):  # it is told the picture, and sets out from noise
        for name, value in how.items():
            if value is not None:
                does = "enlarges" if family.enlarges(network) else "varies"
                raise ValueError(f"{name} edits a picture, and this model {does} one: leave it out")
        asked.told["image"], image = image, None
    if family.embeds:
        for name in ("height", "width", "image"):
            if getattr(asked, name) is not None:
                raise ValueError(f"{name}: a prior draws embeddings of texts: leave it out")
    span = asked.denoising_start, asked.denoising_end
    shares, latents = part(*span, image, asked.latents, **how)
    unit, edit = codec.factor * family.patch(network), Edit()
    if asked.denoising_start is None:
        edit = Edit.asked(image, **how, height=height, width=width, codec=codec, unit=unit)
    inpaints = family.inpaints(network)
    if inpaints and edit.drawn is None:
        raise ValueError("this model inpaints: pass the picture as image, and a mask_image")
    height, width = asked.control.sides(height, width, asked.image, unit)
    numbers = edit.numbers(len(pictures.prompts), pictures.each)

    def of(pixels: Tensor) -> Tensor:
        return encoded(codec, pixels, numbers, pictures.generators, device)

    known, side = None, family.side(network)
    if edit.latents is not None:
        known = edit.latents.to(device, torch.float32)[numbers]
        side = known.shape[-2:]
    elif edit.pixels is not None and edit.strength < 1:
        known = of(edit.pixels)
    height, width = edit.sides or (height, width)
    beside = dict[str, Tensor]()
    shape: tuple[int, ...] = (family.channels(network),)
    if not family.embeds:
        shape += cells_of(codec, side, height, width, latents, family.patch(network))
    size = codec.size(torch.empty(shape, device="meta"))
    if family.before:
        beside = family.beside(asked.told, parts, pictures, size, device)
    x = noise(pictures, shape, latents, device)
    if pictures.varied is not None:
        generators, strengths = pictures.varied
        x = varied(x, generators, strengths)
    if known is not None and known.shape != x.shape:
        raise ValueError(f"image: latents of shape {tuple(known.shape)}, not {tuple(x.shape)}")
    if not family.before:
        beside = family.beside(asked.told, parts, pictures, size, device)
    hints = asked.control.beside(pictures, size, device)
    beside, no = beside | hints, family.unsaid(beside) | hints
    if edit.pixels is None or edit.drawn is None:
        return Begin(x, shares, edit, numbers, known, beside=beside, unsaid=no)
    if inpaints:
        mask = nearest_cells(edit.drawn, codec.factor)[numbers].to(device)
        told = {INPAINTED: torch.cat([mask, of(edit.pixels * (1 - edit.drawn))], 1)}
        return Begin(x, shares, edit, numbers, known, beside=beside | told, unsaid=no | told)
    if known is None:  # all of the hole is drawn anew: nothing of what is in it is known
        known = of(filled(edit.pixels, edit.drawn))
    drawn = cells(edit.drawn, codec.factor)[numbers].to(device)
    return Begin(x, shares, edit, numbers, known, drawn, beside, no)


def cells_of(
    codec: Codec,
    side: int | Sequence[int] | None,
    height: int | None,
    width: int | None,
    latents: Tensor | None,
    patch: int = 1,
) -> tuple[int, int]:
    """Height and width in cells of the latents of pictures of this size.

    Args:
        codec: from latents to pixels.
        side: of latents whose size is not given, or their height and width, in cells.
        height: in pixels, or None.
        width: in pixels, or None.
        latents: noise that is passed, or None.
        patch: side of a token of the denoiser, in latent cells.

    Raises:
        ValueError: there are no latents of this size.
    """
    rows, columns = (side, side) if side is None or isinstance(side, int) else side
    if latents is not None and latents.ndim == 4:
        rows, columns = latents.shape[2:]
    sizes, unit = list[int](), codec.factor * patch
    for name, pixels, latent in (("height", height, rows), ("width", width, columns)):
        if pixels is None and latent is None:
            raise ValueError("this U-Net states no sample_size: pass both height and width")
        asked = latent * codec.factor if pixels is None else pixels
        if asked < 1 or asked % unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels, not {asked}")
        sizes.append(asked // codec.factor)
    return sizes[0], sizes[1]


def noise(
    pictures: Pictures, shape: Sequence[int], latents: Tensor | None, device: torch.device
) -> Tensor:
    """Standard normal noise ``n ...``: ``latents``, or a draw.

    Args:
        pictures: which.
        shape: of each.
        latents: noise, or None.
        device: where it is to lie.

    Raises:
        ValueError: ``latents`` are of another shape, or are not finite.
    """
    every = (len(pictures), *shape)
    if latents is None:
        draws = pictures.generators
        return randn_tensor(every, generator=draws, device=device, dtype=torch.float32)
    if tuple(latents.shape) != every:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, not {every}")
    x = latents.to(device, torch.float32)
    if not bool(x.isfinite().all()):
        raise ValueError("latents hold nan or inf: pass standard normal noise")
    return x
