"""What data sheets say of GPUs (NVIDIA, 2025), for a dry run on a machine that has none."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Args:
        name: as it is called.
        half: TFLOP/s of dense matrix products of 16 bits, summed in float32.
        tf32: the same of float32 rounded to TF32; None: it has none.
        single: the same of float32.
        memory: gigabytes as it is sold; most have a few per cent more bytes than 10^9 of each.
        bfloat16: whether it has it in hardware; or else it computes in float32.
    """

    name: str
    half: float
    tf32: float | None
    single: float
    memory: int
    bfloat16: bool = True

    def precision(self, asked: str) -> str:
        """That which a run that asks for ``asked`` computes in there."""
        if asked in ("auto", "bfloat16"):  # which is emulated where there is none
            return "bfloat16" if self.bfloat16 else "float32"
        return asked

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products in ``precision``, one that ``self.precision`` returns."""
        if precision in ("bfloat16", "float16"):
            return 1e12 * self.half
        rounded = self.tf32 if precision == "tf32" else None
        return 1e12 * (rounded or self.single)


GPUS = (
    Gpu("T4", 65, None, 8.1, 16, bfloat16=False),
    Gpu("A10", 125, 62.5, 31.2, 24),
    Gpu("L4", 121, 60, 30.3, 24),
    Gpu("L40S", 362, 183, 91.6, 48),
    Gpu("A100", 312, 156, 19.5, 40),
    Gpu("A100 80GB", 312, 156, 19.5, 80),
    Gpu("H100", 989, 495, 67, 80),
    Gpu("H200", 989, 495, 67, 141),
    Gpu("RTX 3060", 25.5, 12.7, 12.7, 12),
    Gpu("RTX 3090", 71, 35.6, 35.6, 24),
    Gpu("RTX 4070", 58.3, 29.1, 29.1, 12),
    Gpu("RTX 4080", 97.5, 48.7, 48.7, 16),
    Gpu("RTX 4090", 165.2, 82.6, 82.6, 24),
    Gpu("RTX 5090", 209.5, 104.8, 104.8, 32),
)


def known(name: str) -> Gpu:
    """That of ``name``, however it is spaced and written.

    Raises:
        ValueError: there is none.
    """

    def plain(text: str) -> str:
        return re.sub(r"nvidia|geforce|[\s_-]", "", text.lower())

    for gpu in GPUS:
        if plain(gpu.name) == plain(name):
            return gpu
    raise ValueError(f"{name!r} is none of {', '.join(gpu.name for gpu in GPUS)}: give --memory")
