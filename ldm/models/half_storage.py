"""Weights held in bfloat16: half the memory.

    under autocast   y = bfloat16(W) x, where bfloat16(W) is what is held: no bit changes
    without          y = float32(bfloat16(W)) x

That holds of convolutions and linear layers. What autocast computes in float32, norms and
embeddings among it, keeps float32 weights.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from ldm.models import lora


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if _autocast(input):
            return super().forward(input)
        weight, bias = _as_in(self, input)
        return nn.functional.linear(input, weight, bias)


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if _autocast(input):
            return super().forward(input)
        return self._conv_forward(input, *_as_in(self, input))


_HOLDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def _autocast(input: Tensor) -> bool:
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def _as_in(layer: nn.Linear | nn.Conv2d, input: Tensor) -> tuple[Tensor, Tensor | None]:
    bias = layer.bias
    return layer.weight.to(input.dtype), None if bias is None else bias.to(input.dtype)


def halve(network: nn.Module, only: Container[int] | None = None) -> None:
    """Makes ``network`` hold the weights of its convolutions and linear layers in bfloat16, but for
    adapters, what DoRA takes the norm of, and its first layer, by which a network tells its dtype.

    Args:
        network: its layers get another class.
        only: ids of parameters: layers that have others stay as they are; None: all layers.
    """
    kept = {id(p) for p in lora.weights(network).values()}
    kept.add(id(next(network.parameters())))
    for module in lora.normed(network):
        kept |= {id(p) for p in module.get_base_layer().parameters()}
    for module in network.modules():
        mine = {id(p) for p in module.parameters(recurse=False)}
        if only is not None and any(key not in only for key in mine):
            continue
        if (held := _HOLDS.get(type(module))) and not mine & kept:
            module.to(torch.bfloat16)
            module.__class__ = held
