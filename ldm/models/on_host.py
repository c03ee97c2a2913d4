"""A network as it is now, in the host's memory, while the network itself learns on."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


@torch.no_grad()
def on_host(network: N) -> N:
    """``network`` with copies of what learns, and of its buffers; frozen parameters are shared."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = parameter
        if parameter.requires_grad:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True))
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copy.deepcopy(network, memo)
