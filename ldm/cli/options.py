"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import fail

Steps = Annotated[
    int | None, typer.Option(help="Steps of the sampler; what the folder states, else 30.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 is none; what the folder states, else 7.5.")
]


def weighted(text: str, default: float = 1.0) -> tuple[Path, float]:
    """``PATH`` or ``PATH:WEIGHT`` as both; a path that is there is one, whatever it ends in."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), default
    try:
        weight = float(number)
    except ValueError:
        return Path(text), default
    if not math.isfinite(weight):
        fail(f"--lora {text}: the weight must be a finite number")
    return Path(path), weight
