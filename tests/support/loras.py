"""Low-rank updates as after a training, and when two are the same."""

from __future__ import annotations

import torch
from torch import nn

from ldm.formats.lora import Lora


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
