"""Low-rank updates as after a training, when two are the same, and short runs that train some."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.formats.lora import Lora
from runs import ROOT


def shake(network: nn.Module) -> None:
    """As after a training: no adapter is what it started as."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def equal(one: Lora, other: Lora) -> bool:
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        for name, update in one[part].items():
            theirs = other[part][name]
            for a, b in ((update.down, theirs.down), (update.up, theirs.up)):
                assert torch.equal(a, b), name
            assert update.alpha == theirs.alpha, name
            assert (update.magnitude is None) == (theirs.magnitude is None), name
            if update.magnitude is not None:
                assert torch.equal(update.magnitude, theirs.magnitude), name
    return True


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def short(config: str, base: Path, run: Path, *more: str) -> TrainConfig:
    """``configs/CONFIG.yaml`` for two steps on tiny pictures, from the folder ``base``."""
    small = [
        f"run={run}", f"model={base}", "data={kind: shapes, count: 24, size: 16}",
        "images={size: 16}", "batch_size=8", "duration=2 steps",
        "optimizer={lr: 1e-2, schedule: constant}", "validation=null", "precision=float32",
        "lora={rank: 2, alpha: 3}",
    ]  # fmt: skip
    return load(TrainConfig, ROOT / "configs" / f"{config}.yaml", [*small, *more])
