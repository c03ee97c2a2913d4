"""AdamW over the parameters that learn, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ldm.engine.schema import AdamW


def adamw(weights: Mapping[str, nn.Parameter], settings: AdamW) -> torch.optim.AdamW:
    """The optimiser of ``weights``; vectors (norms, biases, DoRA's magnitudes) do not decay."""

    def flat_one(name: str) -> bool:
        return weights[name].ndim < 2 or "lora_magnitude_vector" in name

    flat = [p for name, p in weights.items() if flat_one(name)]
    deep = [p for name, p in weights.items() if not flat_one(name)]
    on_cpu = all(p.device.type == "cpu" for p in weights.values())
    return torch.optim.AdamW(
        [{"params": deep}, {"params": flat, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        # On a CPU the default is a pass over memory for every operation, 2.5 times as slow.
        fused=on_cpu or None,
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
