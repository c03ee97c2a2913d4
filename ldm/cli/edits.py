"""What ``ldm sample`` is told of a picture that it sets out from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.failure import there
from ldm.editing import enlarge

Image = Annotated[
    Path | None, typer.Option(help="A picture to set out from; the result has its size.")
]
Mask = Annotated[
    Path | None, typer.Option(help="Its mask: white is drawn, the rest stays to the byte.")
]
Strength = Annotated[
    float | None,
    typer.Option(help="0 to 1: share of the steps taken from --image; 0.75, or with a mask 1."),
]
Feather = Annotated[
    int | None, typer.Option(help="Pixels on which what is drawn fades into the rest of --image.")
]
Outpaint = Annotated[
    str | None,
    typer.Option(help="LEFT,TOP,RIGHT,BOTTOM pixels that are drawn around --image."),
]
MaskCrop = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Draw the part of --image around the mask alone, with so many pixels around it, at"
        " --size (the model's own), and put it back: for small things in photographs.",
    ),
]
VariationSeed = Annotated[
    int | None,
    typer.Option(help="Picture i is a variation of --seed towards this seed + i."),
]
VariationStrength = Annotated[
    float, typer.Option(help="0 to 1: how far towards it; 1 is the other seed's picture.")
]
Enlarge = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE[,STRENGTH[,latent|pixel]]",
        help="Draw again so many times larger, from what was drawn (a hires fix): 2,0.6,latent.",
    ),
]
Control = Annotated[
    list[Path] | None,
    typer.Option(help="A picture that --controlnet follows; once for each of them."),
]
ControlNet = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of a ControlNet of the model. May be repeated."),
]
T2IAdapter = Annotated[
    list[Path] | None,
    typer.Option("--t2i-adapter", help="Folder of a T2I-Adapter of the model. May be repeated."),
]
Hint = Annotated[
    list[Path] | None,
    typer.Option(help="A picture that --t2i-adapter follows; once for each of them."),
]
IPAdapter = Annotated[
    list[Path] | None,
    typer.Option(
        "--ip-adapter",
        help="An IP-Adapter of the model, its file or folder, with its image_encoder beside. May be"
        " repeated.",
    ),
]
IPImage = Annotated[
    list[Path] | None,
    typer.Option("--ip-image", help="A picture that --ip-adapter is told; once for each of them."),
]
IPScale = Annotated[
    list[float] | None,
    typer.Option("--ip-scale", help="How much it says; 1. Once, or once for each."),
]
_SEEDS = 2**32
_LARGE = 4  # times the pixels that a model draws


@dataclass(frozen=True)
class Edits:
    """Options of a picture, each as it was given.

    Args:
        image: its file.
        mask: the file of its mask.
        strength: 0 to 1.
        feather: pixels.
        outpaint: pixels on four sides, with commas between.
        variation: seed of other noise.
        varied: how far towards it.
        hints: files of pictures that ControlNets follow.
        nets: folders of these.
        mask_crop: pixels around the mask that are drawn with it, where that is drawn alone.
        adapters: folders of T2I-Adapters.
        follow: files of pictures that they follow.
        ip_adapters: files or folders of IP-Adapters.
        ip_images: files of pictures that they are told.
        ip_scales: how much each says, or all.
    """

    image: Path | None
    mask: Path | None
    strength: float | None
    feather: int | None
    outpaint: str | None
    variation: int | None
    varied: float
    hints: Sequence[Path] = ()
    nets: Sequence[Path] = ()
    mask_crop: int | None = None
    adapters: Sequence[Path] = ()
    follow: Sequence[Path] = ()
    ip_adapters: Sequence[Path] = ()
    ip_images: Sequence[Path] = ()
    ip_scales: Sequence[float] = ()

    def check(self) -> None:
        """Tells what is wrong before anything is loaded.

        Raises:
            ValueError: the message names the option.
        """
        for option, value in (
            ("mask", self.mask), ("strength", self.strength), ("outpaint", self.outpaint)
        ):  # fmt: skip
            if value is not None and self.image is None:
                raise ValueError(f"--{option} needs --image: the picture that is edited")
        if self.mask is not None and self.outpaint is not None:
            raise ValueError("--outpaint makes a mask of its own: leave out --mask")
        if self.feather is not None and self.mask is None and self.outpaint is None:
            raise ValueError("--feather is that of a --mask, or of --outpaint")
        if self.mask_crop is not None and self.mask is None and self.outpaint is None:
            raise ValueError("--mask-crop is that of a --mask, or of --outpaint")
        if self.mask_crop is not None and self.mask_crop < 0:
            raise ValueError(f"--mask-crop must be 0 pixels or more, not {self.mask_crop}")
        pictures = [("image", self.image), ("mask", self.mask)]
        for option, files, network, nets in (
            ("control", self.hints, "controlnet", self.nets),
            ("hint", self.follow, "t2i-adapter", self.adapters),
            ("ip-image", self.ip_images, "ip-adapter", self.ip_adapters),
        ):
            if len(files) != len(nets):
                raise ValueError(
                    f"--{option} is given {len(files)} times for {len(nets)} --{network}:"
                    " a picture for each"
                )
            pictures += [(option, file) for file in files]
            for folder in nets:  # OWNER/NAME is one of the Hub
                if not there(folder, f"--{network} ") and len(folder.parts) != 2:
                    raise ValueError(f"--{network} {folder}: there is no such file or folder")
        if len(self.ip_scales) not in {0, 1, len(self.ip_adapters)} or (
            self.ip_scales and not self.ip_adapters
        ):
            raise ValueError(
                f"--ip-scale is given {len(self.ip_scales)} times for {len(self.ip_adapters)}"
                " --ip-adapter: once, or for each"
            )
        for scale in self.ip_scales:
            if not math.isfinite(scale):
                raise ValueError(f"--ip-scale must be a finite number, not {scale}")
        for option, path in pictures:
            if path is not None and not (there(path, f"--{option} ") and path.is_file()):
                raise ValueError(f"--{option} {path}: there is no such file")
        for option, share in (
            ("strength", self.strength), ("variation-strength", self.varied)
        ):  # fmt: skip
            if share is not None and not (math.isfinite(share) and 0 <= share <= 1):
                raise ValueError(f"--{option} must lie in 0..1, not {share}")
        if self.variation is not None and not 0 <= self.variation < _SEEDS:
            raise ValueError(f"--variation-seed must lie in 0..2^32 - 1, not {self.variation}")
        if self.outpaint is not None and not re.fullmatch(r"\d{1,5}(,\d{1,5}){3}", self.outpaint):
            raise ValueError(
                f"--outpaint must look like 0,0,64,0 (LEFT,TOP,RIGHT,BOTTOM), not {self.outpaint!r}"
            )

    def of(self, settings: Any) -> Edits:
        """The same, with what ``settings`` say of edits."""
        return replace(
            self,
            strength=settings.strength,
            variation=settings.variation_seed,
            varied=settings.variation_strength,
        )

    def call(self, seeds: list[int], others: list[int]) -> dict[str, Any]:
        """Arguments of a call of the pipeline that draws a picture of each seed, a variation each
        of it towards one of ``others`` if there are some.

        Raises:
            ValueError: a file is no picture.
        """
        found: dict[str, Any] = {"seed": seeds}
        if others:
            found["variation"] = (others, self.varied)
        if self.hints:
            found["control_image"] = _one(list(map(_picture, self.hints)))
        if self.follow:
            found["adapter_image"] = _one(list(map(_picture, self.follow)))
        if self.ip_images:
            found["ip_adapter_image"] = list(map(_picture, self.ip_images))
        if self.image is None:
            return found
        found |= {"image": _picture(self.image), "strength": self.strength}
        if self.mask is not None:
            found |= {"mask_image": _picture(self.mask, white=False), "feather": self.feather}
        if self.outpaint is not None:
            from ldm.editing.masks import outpainted

            sides = zip(("left", "top", "right", "bottom"), self.outpaint.split(","), strict=True)
            around = {name: int(pixels) for name, pixels in sides}
            image, mask = outpainted(found["image"], **around)
            found |= {"image": image, "mask_image": mask, "feather": self.feather}
        if self.mask_crop is not None:
            found["padding_mask_crop"] = self.mask_crop
        return found

    def beside(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``: the networks that stand beside the model's."""
        every = {"controlnet": self.nets, "adapter": self.adapters}
        return {part: _one(list(map(str, nets))) for part, nets in every.items() if nets}

    def load(self, pipe: Any) -> None:
        """Puts IP-Adapters into the network of ``pipe``.

        Raises:
            ValueError: one is none, or none of this model.
        """
        if self.ip_adapters:
            pipe.load_ip_adapter(list(map(str, self.ip_adapters)))
            pipe.set_ip_adapter_scale(_one(list(self.ip_scales or [1.0])))

    def size(self, picture: Any, settings: Any) -> str | None:
        """The size to ask for again to get ``picture``, drawn with ``settings``."""
        if self.mask_crop is not None:
            return settings.size
        if self.image is not None:
            return None
        own = f"{picture.width}x{picture.height}"
        return settings.size if settings.enlarge is not None else own

    def note(self, pipe: Any) -> str | None:
        """What to say of a picture that is much larger than those that ``pipe`` draws, if it is to
        be drawn whole.
        """
        side = pipe.family.side(pipe.network)
        if self.image is None or self.mask_crop is not None or not isinstance(side, int):
            return None
        width, height = _picture(self.image).size
        own = side * pipe.codec.factor
        if width * height <= _LARGE * own**2:
            return None
        shrink, unit = own / math.sqrt(width * height), pipe.codec.factor * 2
        smaller = "x".join(
            str(max(1, round(one * shrink / unit)) * unit) for one in (width, height)
        )
        masked = self.mask is not None or self.outpaint is not None
        instead = "--mask-crop 32 draws what is around the mask alone, and " if masked else ""
        return (
            f"{self.image} has {width} x {height} pixels and is drawn whole by a model of"
            f" {own} x {own}: that is slow, and things are drawn small and many times;"
            f" {instead}--size {smaller} makes it smaller first"
        )

    def share(self) -> float | None:
        """The strength that the picture is edited with, if it is."""
        if self.image is None:
            return None
        from ldm.editing.edit import STRENGTH

        masked = self.mask is not None or self.outpaint is not None
        usual = 1.0 if masked else STRENGTH
        return usual if self.strength is None else self.strength


def enlarging(text: str | None) -> enlarge.Enlarge | None:
    """What --enlarge says; None: nothing.

    Raises:
        ValueError: it says something else.
    """
    if text is None:
        return None
    scale, strength, by, *rest = [*text.split(","), "", ""][: max(3, text.count(",") + 1)]
    usual = enlarge.Enlarge(math.nan)
    try:
        numbers = float(scale), float(strength or usual.strength)
    except ValueError:
        numbers = math.nan, math.nan
    try:
        return enlarge.Enlarge.of((*numbers, by or usual.by, *rest))
    except ValueError as error:
        raise ValueError(f"--enlarge must look like 2,0.6,latent: {error}, not {text!r}") from None


def _one(many: list[Any]) -> Any:
    """The only one of them, or all."""
    return many if len(many) > 1 else many[0]


def _picture(path: Path, *, white: bool = True) -> Any:
    """The picture of a file, what is transparent over white or black."""
    from ldm.data.images import flatten
    from ldm.data.picture import decode

    image = decode(path.read_bytes(), str(path))
    return flatten(image, (255, 255, 255) if white else (0, 0, 0))
