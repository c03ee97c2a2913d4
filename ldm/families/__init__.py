"""Families of models: one file each, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.families.flux import Flux
from ldm.families.imagen import Imagen
from ldm.families.model import INPAINTED, Family, FamilyDenoiser, Tower
from ldm.families.pixels import Pixels
from ldm.families.sd import StableDiffusion
from ldm.families.sd3 import StableDiffusion3
from ldm.families.sdxl import StableDiffusionXL
from ldm.families.unclip import Unclip
from ldm.families.unclip_prior import UnclipPrior
from ldm.models.wrapped import bare

TEXT = "text_encoder"
"""What the names of text towers begin with."""

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        Imagen(),
        UnclipPrior(),
        Unclip(),
        StableDiffusion(),
        Pixels(),
    )
}
"""By the name that a config's ``family`` gives; the first that fits a pipeline is its own."""


def family_of(parts: Mapping[str, Any]) -> Family:
    """The family of a pipeline with the components ``parts``, those that are absent being None; of
    text towers alone, the one that they are most of.
    """
    found = next((family for family in FAMILIES.values() if family.fits(parts)), None)
    if found is not None:
        return found
    there = {n: bare(part) for n, part in parts.items() if part is not None and n.startswith(TEXT)}
    kinds = {f: {t.part: t.network for t in f.towers} for f in FAMILIES.values()}
    having = [
        family
        for family, known in kinds.items()
        if all(isinstance(part, known.get(name, ())) for name, part in there.items())
    ]
    if not having:
        raise ValueError(f"{', '.join(there)}: of no known family of models")
    # Of those with as many towers the last, which is the least particular one.
    return min(reversed(having), key=lambda family: len(family.towers))


__all__ = ["FAMILIES", "INPAINTED", "Family", "FamilyDenoiser", "Tower", "family_of"]
