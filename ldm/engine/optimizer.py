"""The optimiser of the parameters that learn, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.config.schema import Optimizer
from ldm.engine.optimizer_kinds import build
from ldm.engine.optimizer_state import found_so_far, is_matrix
from ldm.engine.pieces import InPieces


def optimizer_of(
    weights: Mapping[str, nn.Parameter], settings: Optimizer, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimiser of ``weights``, in groups of one ``factor`` on the learning rate.

    Vectors (norms, biases, DoRA's magnitudes) and the embeddings of new words do not decay.

    Args:
        weights: the parameters that learn, by name.
        settings: the optimiser of the config.
        seed: of what weights in bfloat16 are rounded by.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    factors = settings.factors()

    def part(name: str) -> str:
        # text_encoder stands for text_encoder_2 as well.
        return next((key for key in factors if name.partition(".")[0].startswith(key)), "")

    groups = list[dict[str, Any]]()
    for key in ("", *factors):
        beside = {"part": key, "factor": factors.get(key, 1.0)}
        for matrices in (True, False):
            mine = [
                weight
                for name, weight in weights.items()
                if part(name) == key and is_matrix(name, weight) is matrices
            ]
            decay = settings.weight_decay if matrices else 0.0
            groups.append({"params": mine, "weight_decay": decay, "matrices": matrices, **beside})
    optimizer, backward = build([g for g in groups if g["params"]], settings), settings.in_backward
    if backward or any(weight.dtype == torch.bfloat16 for weight in weights.values()):
        return InPieces(optimizer, weights, seed, backward=backward)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float, seen: int = 0) -> dict[str, float]:
    """Sets the learning rates of the step that begins at image ``seen``, of which ``rate`` is that
    without a factor; returns what is logged: ``learning_rate``, and ``learning_rate/PART`` where a
    part has its own; what ``prodigy`` multiplies it by is ``prodigy_d``.
    """
    if isinstance(optimizer, InPieces):
        optimizer.seen = seen
    rates = {"learning_rate": rate}
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
        if group["part"]:
            rates[f"learning_rate/{group['part']}"] = group["lr"]
    if "d" in (found := found_so_far(optimizer)):
        rates["prodigy_d"] = found["d"]
    return rates


def learning_rate(
    config: Optimizer, seen: int, warmup: int, total: int, cooldown: int | None = None
) -> float:
    """Learning rate of the batch that starts at image ``seen``, for lengths in images."""
    if seen < warmup:
        return config.lr * (seen + 1) / (warmup + 1)
    start = warmup if cooldown is None else max(warmup, total - cooldown)
    if config.schedule == "constant" or seen < start:
        return config.lr
    done = (seen - start) / max(total - start, 1)
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final + (1 - config.final) * falling)
