"""Noise between two seeds: pictures that are much like one that there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.sampling.ode import slerp


def varied(
    noise: Tensor, generators: Sequence[torch.Generator], strengths: Sequence[float]
) -> Tensor:
    """``noise``, ``n c h w``, of every picture moved by its strength towards that of another
    generator, on the arc on which all is as long as noise is: at 0 as it is, at 1 the other, to the
    bit.
    """
    found = []
    for own, generator, strength in zip(noise.split(1), generators, strengths, strict=True):
        other = randn_tensor(tuple(own.shape), generator, noise.device, noise.dtype)
        ends = {0.0: own, 1.0: other}
        found.append(ends[strength] if strength in ends else slerp(own, other, strength))
    return torch.cat(found)
