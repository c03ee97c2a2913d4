"""AdamW over the parameters that learn, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ldm.config.schema import AdamW

_NOT_DECAYING = ("lora_magnitude_vector", "token_embedding.rows")


def adamw(weights: Mapping[str, nn.Parameter], settings: AdamW) -> torch.optim.AdamW:
    """The optimiser of ``weights``, in groups of one ``factor`` on the learning rate.

    Vectors (norms, biases, DoRA's magnitudes) and the embeddings of new words do not decay.
    """
    factors = settings.factors()

    def flat_one(name: str) -> bool:
        return weights[name].ndim < 2 or any(kind in name for kind in _NOT_DECAYING)

    def part(name: str) -> str:
        # text_encoder stands for text_encoder_2 as well.
        return next((key for key in factors if name.partition(".")[0].startswith(key)), "")

    groups = []
    for key in ("", *factors):
        mine = [name for name in weights if part(name) == key]
        beside = {"part": key, "factor": factors.get(key, 1.0)}
        deep = [weights[name] for name in mine if not flat_one(name)]
        flat = [weights[name] for name in mine if flat_one(name)]
        groups += [{"params": deep, **beside}, {"params": flat, "weight_decay": 0.0, **beside}]
    plain = all(p.device.type in ("cpu", "cuda") for p in weights.values())
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        # The default is a pass over memory for every operation: 2.5 times as slow on a CPU, many
        # kernels to launch on a GPU.
        fused=plain or None,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> dict[str, float]:
    """Sets the learning rates of a step of which ``rate`` is that without a factor; returns what is
    logged: ``learning_rate``, and ``learning_rate/PART`` where a part has its own.
    """
    rates = {"learning_rate": rate}
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
        if group["part"]:
            rates[f"learning_rate/{group['part']}"] = group["lr"]
    return rates


def learning_rate(
    config: AdamW, seen: int, warmup: int, total: int, cooldown: int | None = None
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
