"""Options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.failure import fail, there

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

Steps = Annotated[
    int | None, typer.Option(help="Steps of the sampler; what the folder states, else 30.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 is none; what the folder states, else 7.5.")
]


Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA of diffusers or kohya: its file or folder, or PATH:WEIGHT. May be repeated."
    ),
]


class Dtype(StrEnum):
    """What networks compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def on(self, device: str) -> Any:
        """The ``torch.dtype`` that this is on ``device``."""
        import torch

        if self is not Dtype.auto:
            return getattr(torch, self.value)
        gpu = device.partition(":")[0] == "cuda" and torch.cuda.is_available()
        fast = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32


ComputesIn = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="What the networks compute in; auto: bfloat16 on a GPU that has it, else float32.",
    ),
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


def there_are(paths: Sequence[Path], option: str) -> None:
    """Fails unless each of ``paths``, given by ``--option``, is there."""
    for path in paths:
        if not there(path, f"--{option} "):
            fail(f"--{option} {path}: there is no such file or folder")


def load_loras(pipe: LatentDiffusionPipeline, loras: Sequence[tuple[Path, float]]) -> None:
    """Loads each into ``pipe``, all at once at their weights."""
    names = [f"lora{number}" for number in range(len(loras))]
    for (path, _), name in zip(loras, names, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    if loras:
        pipe.set_adapters(names, [weight for _, weight in loras])
