"""The noise level as a pair: x_t = alpha x0 + sigma eps.

The pair is canonical, never the ratio: sigma / alpha is infinite at zero terminal SNR.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Level(NamedTuple):
    """(alpha, sigma) of a batch, tensors of shape ``b`` (or scalars), float64 unless cast."""

    alpha: Float[Tensor, "..."]
    sigma: Float[Tensor, "..."]

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2

    @property
    def logsnr(self) -> Tensor:
        """log(alpha^2 / sigma^2); -inf at zero terminal SNR."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def like(self, x: Float[Tensor, "b ..."]) -> Level:
        """The same level on the device of ``x``, broadcast against its axes behind the batch.

        The dtype is float32 (float64 if ``x`` is float64), never less: in bfloat16 sigma would be 0
        at the clean end and only 192 of 1,000 levels would stay distinct.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = (-1,) + (1,) * (x.ndim - 1)
        return Level(*(torch.as_tensor(part).to(x.device, dtype).reshape(shape) for part in self))
