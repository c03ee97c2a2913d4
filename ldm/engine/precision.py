"""What a run computes in, where its config leaves that to the machine (``auto``).

    precision  bfloat16 where the device has it in hardware, else float32
    attention  plain matrix products in bfloat16 on a CPU, else PyTorch's fused one

It is decided once, before anything is built, and kept in every checkpoint: a run goes on in what it
began in, on whatever machine. float16 is never chosen: it scales its losses and leaves out steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from ldm.config.schema import RunConfig, TrainConfig
from ldm.engine import state
from ldm.errors import ConfigError
from ldm.models import tf32
from ldm.models.attention import chosen

C = TypeVar("C", bound=RunConfig)

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MIXED = {"float32": "no", "tf32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's words for them."""
SLOWER = 12.4
"""How many times as long a step takes in bfloat16 as in float32 on a CPU without it: 8.60 and 0.69
CPU seconds for a U-Net of 11 M parameters, batch 8, AVX2 (AMD EPYC, torch 2.14)."""


class Settled(NamedTuple, Generic[C]):
    """A config that leaves nothing to the machine.

    Args:
        config: in which no field is ``auto``.
        told: what was chosen and why, by field.
        slow: warnings of what was asked for and is slow on this device.
    """

    config: C
    told: dict[str, str]
    slow: list[str]


def device_at_hand() -> torch.device:
    """A GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named(device: torch.device) -> str:
    """The card's name; of a CPU its kind and the threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    kind = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({kind}, {threads} thread{'s' * (threads > 1)})"


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = torch.cpu.get_capabilities()
    # On x86 oneDNN says yes from AVX-512 on, where it may have to emulate it.
    emulated = known.get("architecture") == "x86_64" and not known.get("avx512_bf16")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def compute_in(precision: str) -> None:
    """Lets float32 be computed as a run in ``precision`` does: exactly in ``float32``, by TF32 in
    the others, where it is what autocast leaves, and what is drawn and measured.
    """
    rounds = precision != "float32"
    tf32.allow(convolutions=rounds, products=rounds)


def settled(config: C, device: torch.device) -> Settled[C]:
    """``config`` for ``device``, or as the run in its folder was begun.

    Raises:
        ConfigError: the device cannot compute in the precision.
    """
    before = state.begun(Path(config.run))
    began = before.get("precision")
    precision, why = config.precision, ""
    if precision == "auto":
        precision, why = "bfloat16", " (auto)"
        if began in DTYPES:
            precision, why = began, " (auto: the run began in it)"
        elif not has_bfloat16(device):
            precision = "float32"
            why = f" (auto: this {_kind(device)} has no bfloat16 in hardware)"
    out = "leave precision out, or set it to float32"
    if precision == began:
        out = "to leave it set precision to float32 and name precision in resume.allow"
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(
            f"precision: float16 needs a CUDA GPU, and this {_kind(device)} only emulates it: {out}"
        )
    slow, bfloat16 = list[str](), precision == "bfloat16"
    if bfloat16 and not has_bfloat16(device):
        longer = f"{SLOWER} times as long as" if device.type == "cpu" else "longer than"
        slow.append(
            f"precision: this {_kind(device)} has no bfloat16 in hardware: a step takes some"
            f" {longer} in float32; {out}"
        )
    changes, told = {"precision": precision}, {"precision": precision + why}
    if isinstance(config, TrainConfig):
        asked, kept = config.attention, before.get("attention")
        goes_on = asked == "auto" and kept in ("sdpa", "plain")
        attention = kept if goes_on else chosen(asked, device, bfloat16=bfloat16)
        changes["attention"] = attention
        why = " (auto: the run began with it)" if goes_on else " (auto)" * (asked == "auto")
        told["attention"] = attention + why
        if attention == "sdpa" and bfloat16 and device.type == "cpu":
            slow.append(
                "attention: the backward pass of sdpa is several times slower in bfloat16 than in"
                " float32 on a CPU; leave attention out, or set it to plain"
            )
    return Settled(replace(config, **changes), told, slow)


def _kind(device: torch.device) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device.type, device.type)
