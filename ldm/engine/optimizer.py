"""AdamW over the parameters that learn, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ldm.engine.schema import AdamW


def adamw(weights: Mapping[str, nn.Parameter], settings: AdamW) -> torch.optim.AdamW:
    """The optimiser of ``weights``; vectors (norms and biases) do not decay."""
    flat = [p for p in weights.values() if p.ndim < 2]
    deep = [p for p in weights.values() if p.ndim >= 2]
    return torch.optim.AdamW(
        [{"params": deep}, {"params": flat, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def learning_rate(config: AdamW, seen: int, warmup: int, total: int) -> float:
    """Learning rate of the batch that starts at image ``seen``, for lengths in images."""
    if seen < warmup:
        return config.lr * (seen + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = (seen - warmup) / max(total - warmup, 1)
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final + (1 - config.final) * falling)
