"""Linear layers whose weights are held in 8 or 4 bits, below adapters that learn.

    int8   W ~ s q / 127, q in [-127, 127], s = max |W| of every output    (Dettmers et al. 2022)
    nf4    W ~ s c[q], 16 levels c for normal weights, s of every 64        (Dettmers et al. 2023)

The layers are bitsandbytes' own, as ``BitsAndBytesConfig`` of diffusers makes them: weights are
turned back for every product, forward and backward; of int8 what comes in is in 8 bits too.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ldm.models import lora

Bits = Literal["int8", "nf4"]
PACKAGE = "bitsandbytes"
_BYTES = {"int8": (1, 0), "nf4": (1 / 2, 4 / 64)}
"""Of each weight, and of its share of what belongs to 64."""

_UNIT = {"int8": 1, "nf4": 64}
"""Of which a layer has a multiple, inputs and outputs: what kernels of ``nf4`` for CPUs demand."""


def installed() -> bool:
    """Whether the package is there."""
    return find_spec(PACKAGE) is not None


def quantise(network: nn.Module, bits: Bits) -> int:
    """Makes ``network`` hold the weights of its linear layers in ``bits``, but for adapters, and
    returns how many there are. On the meta device they are as large, and nothing more.

    Args:
        network: its layers are replaced; names of adapters stay.
        bits: of the weights.
    """
    kept = {id(p) for p in lora.weights(network).values()}
    kept.add(id(next(network.parameters())))  # by which a network tells its dtype
    count = 0
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or id(layer.weight) in kept:
                continue
            if not (layer.in_features % _UNIT[bits] or layer.out_features % _UNIT[bits]):
                setattr(module, name, _held(layer, bits))
                count += 1
    return count


def _held(layer: nn.Linear, bits: Bits) -> nn.Module:
    if layer.weight.is_meta:
        return _Sized(layer, bits)
    from bitsandbytes import nn as low

    shape, weight = (layer.in_features, layer.out_features), layer.weight.detach()
    with torch.device("meta"):
        made: Any = (
            low.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            if bits == "int8"
            else low.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        )
    if bits == "int8":
        made.weight = low.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": False}
        half = weight.to(torch.bfloat16)
        made.weight = low.Params4bit(half, requires_grad=False, module=made, **options)
    made.bias = layer.bias
    return made.to(weight.device)  # which packs it


class _Sized(nn.Module):
    """What ``layer`` takes of memory and arithmetic in ``bits``, without numbers."""

    def __init__(self, layer: nn.Linear, bits: Bits) -> None:
        super().__init__()
        own, shared = _BYTES[bits]
        size = math.ceil(layer.weight.numel() * (own + shared))
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias, self.out_features = layer.bias, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        made = _Product.apply(input, self.out_features)
        return made if self.bias is None else made + self.bias.to(made.dtype)


class _Product(torch.autograd.Function):
    """A product whose weight is there only while it is computed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, width: int) -> Tensor:
        ctx.shape, ctx.dtype = (width, input.shape[-1]), input.dtype
        weight = torch.empty(ctx.shape, dtype=torch.bfloat16, device=input.device)
        return linear(input.to(torch.bfloat16), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = torch.empty(ctx.shape, dtype=torch.bfloat16, device=gradient.device)
        return (gradient.to(torch.bfloat16) @ weight).to(ctx.dtype), None
