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
_SEEDS = 2**32
_LARGEST = 8  # times that a side is made larger


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
        if len(self.hints) != len(self.nets):
            raise ValueError(
                f"--control is given {len(self.hints)} times for {len(self.nets)} --controlnet:"
                " a picture for each"
            )
        pictures = ("image", self.image), ("mask", self.mask)
        for option, path in (*pictures, *(("control", hint) for hint in self.hints)):
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
            hints = [_picture(path) for path in self.hints]
            found["control_image"] = hints if len(hints) > 1 else hints[0]
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
        return found

    def beside(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``: the networks that stand beside the model's."""
        if not self.nets:
            return {}
        nets = list(map(str, self.nets))
        return {"controlnet": nets if len(nets) > 1 else nets[0]}

    def size(self, picture: Any, settings: Any) -> str | None:
        """The size to ask for again to get ``picture``, drawn with ``settings``."""
        if self.image is not None:
            return None
        own = f"{picture.width}x{picture.height}"
        return settings.size if settings.enlarge is not None else own

    def share(self) -> float | None:
        """The strength that the picture is edited with, if it is."""
        if self.image is None:
            return None
        from ldm.editing.edit import STRENGTH

        masked = self.mask is not None or self.outpaint is not None
        usual = 1.0 if masked else STRENGTH
        return usual if self.strength is None else self.strength


def enlarging(text: str | None) -> dict[str, Any]:
    """What --enlarge says, by the arguments of ``ldm.editing.passes.enlarged``; {}: nothing.

    Raises:
        ValueError: it says something else.
    """
    if text is None:
        return {}
    scale, strength, by, *rest = [*text.split(","), "", ""][: max(3, text.count(",") + 1)]
    try:
        found = {"scale": float(scale), "strength": float(strength or 0.6), "by": by or "latent"}
    except ValueError:
        found = {"scale": math.nan, "strength": 0.0, "by": ""}
    fits = 1 < found["scale"] <= _LARGEST and 0 <= found["strength"] <= 1
    if rest or not fits or found["by"] not in ("latent", "pixel"):
        raise ValueError(
            f"--enlarge must look like 2,0.6,latent: more than 1 and at most {_LARGEST}, 0 to 1,"
            f" latent or pixel, not {text!r}"
        )
    return found


def _picture(path: Path, *, white: bool = True) -> Any:
    """The picture of a file, what is transparent over white or black."""
    from ldm.data.images import flatten
    from ldm.data.picture import decode

    image = decode(path.read_bytes(), str(path))
    return flatten(image, (255, 255, 255) if white else (0, 0, 0))
