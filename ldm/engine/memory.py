"""Runs that do not fit into a device: refused before they begin, or told in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.config.optimizer import PIECEWISE, Optimizer
from ldm.config.schema import RunConfig
from ldm.engine import pieces
from ldm.engine.optimizer_state import size
from ldm.engine.precision import named
from ldm.errors import ConfigError, RunError


def memory_of(device: torch.device) -> int | None:
    """Bytes that a GPU has; None of a CPU, whose memory is no fixed share of the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def of_kind(settings: Optimizer, kind: str) -> Optimizer:
    """``settings`` with the usual ones of another ``kind``."""
    return replace(settings, kind=kind, lr=None, betas=None, eps=None)  # type: ignore[arg-type]


def light_kinds(config: RunConfig) -> list[str]:
    """Optimisers that keep little, the lightest last, of which ``config`` can have each."""
    stepwise = config.optimizer.in_backward or getattr(config, "weights", None) == "bfloat16"
    return [k for k in ("adamw8bit", "adafactor") if k in PIECEWISE or not stepwise]


def held(config: RunConfig, weights: Mapping[str, nn.Parameter], frozen: int) -> int:
    """Bytes on the device between two steps, and their gradient: what no activation is in.

    Args:
        config: the run.
        weights: what learns, by name.
        frozen: bytes of what the steps read beside it.
    """
    learning = sum(p.numel() * p.element_size() for p in weights.values())
    copies = len(config.ema.half_lives) if config.ema and not config.ema.device else 0
    kept = (1 + copies) * learning + size(config.optimizer.kind, weights)
    return frozen + kept + pieces.gradient(config, weights.values())


def lighter(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """What takes less memory for what is held, each with those before it: the settings, and the
    config that they make.
    """
    told = list[str]()
    if config.ema is not None and config.ema.device is None:
        told.append("ema.device=cpu ema.every=10")
        config = replace(config, ema=replace(config.ema, device="cpu", every=10))
        yield " ".join(told), config
    if config.optimizer.kind in ("adamw", "prodigy", "muon", "lion"):
        for kind in light_kinds(config):
            config = replace(config, optimizer=of_kind(config.optimizer, kind))
            yield " ".join([*told, f"optimizer.kind={kind}"]), config


def refuse(
    config: RunConfig,
    weights: Mapping[str, nn.Parameter],
    frozen: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """``ConfigError`` where what a run holds is more than ``device`` has, whatever its steps keep;
    it names the settings that would do.

    Args:
        config: the run.
        weights: what learns, by name.
        frozen: what the steps read beside it, by name.
        device: where it is to compute.
    """
    if (there := memory_of(device)) is None:
        return
    beside = sum(value.numel() * value.element_size() for value in frozen.values())
    if (needed := held(config, weights, beside)) <= there:
        return
    fits = (text for text, less in lighter(config) if held(less, weights, beside) <= there)
    then = next(fits, None)
    hint = f"set {then}" if then else "train a LoRA (lora.rank=8), or in shards (FSDP)"
    raise ConfigError(
        f"weights, gradient, optimiser and average of this run are {needed / 1e9:,.1f} GB, and"
        f" {named(device)} has {there / 1e9:,.1f} GB: {hint}; --dry-run --memory"
        f" {there / 1e9:.0f}GB tells what a step adds to them"
    )


@contextmanager
def told(device: torch.device, micro: int) -> Iterator[None]:
    """Makes one line of a device that is full.

    Args:
        device: where the run computes.
        micro: images at a time.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = " ".join(str(error).split(". ")[0].split())
        smaller = f"micro_batch_size below {micro}, " if micro > 1 else ""
        raise RunError(
            f"the memory of {named(device)} is full ({what}): set {smaller}"
            "gradient_checkpointing=true, ema.device=cpu or optimizer.kind=adafactor (--dry-run"
            " --memory tells what each saves); the same command goes on from the last checkpoint"
        ) from None
