"""Rounding of float32 to bfloat16 at random, up or down, so that the mean is the number itself.

    p(up) = (x - low) / (high - low),   low <= x <= high its neighbours in bfloat16

bfloat16 is the upper half of float32's 32 bits: to add 16 random bits to the lower half and to cut
that off is this rounding (Zamirai et al. 2020, section 4). Rounded to the nearest one a step of
less than half a spacing, 1/512 of a weight, would be none; here it is one in so many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion import stream

_CUT = 16  # bits that bfloat16 has less


def draws(seed: int, name: str, seen: int, device: torch.device) -> torch.Generator:
    """What the weight ``name`` is rounded by after the step that begins at image ``seen``: the same
    on every process, and when a run goes on.
    """
    number = int(stream(seed, f"rounding {name}", seen).integers(2**63))
    return torch.Generator(device).manual_seed(number)


def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """``value``, float32 of any shape, in bfloat16. What bfloat16 has stays, infinities and NaN
    among it.
    """
    # In the order of the axes, however the value lies in memory.
    noise = torch.empty(value.shape, dtype=torch.int32, device=value.device)
    noise.random_(0, 1 << _CUT, generator=generator)
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-(1 << _CUT))
    result = bits.view(torch.float32).to(torch.bfloat16)
    # A NaN's bits may be all 1, as a GPU's are, to which nothing can be added.
    return torch.where(value.isfinite(), result, value.to(torch.bfloat16))
