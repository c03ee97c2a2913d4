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

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        Imagen(),
        StableDiffusion(),
        Pixels(),
    )
}
"""By the name that a config's ``family`` gives; the first that fits a pipeline is its own."""


def family_of(parts: Mapping[str, Any]) -> Family:
    """The family of a pipeline with the components ``parts``, those that are absent being None."""
    return next(family for family in FAMILIES.values() if family.fits(parts))


__all__ = ["FAMILIES", "INPAINTED", "Family", "FamilyDenoiser", "Tower", "family_of"]
