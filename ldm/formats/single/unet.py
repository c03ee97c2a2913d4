"""Where the tensors of a U-Net lie: under sgm's names (``ldm.formats.sgm``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.formats.sgm import Layout
from ldm.formats.single.place import Place, Placing


def placing(config: Mapping[str, Any]) -> Placing:
    """That of a ``UNet2DConditionModel``, by its config."""
    layout = Layout.of(config)

    def place(name: str) -> Place | None:
        stem, _, ending = name.rpartition(".")
        theirs = layout.to_sgm(stem)
        return None if theirs is None else Place(f"{theirs}.{ending}")

    return place
