"""The noise level as a pair: x_t = alpha x0 + sigma eps.

The pair is canonical, never the ratio: sigma / alpha is infinite at zero terminal SNR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def broadcast(part: Tensor, x: Tensor) -> Tensor:
    """A number per sample (``b``, or a scalar), broadcast against the axes of ``x``, on its device.

    The dtype is float32 (float64 if ``x`` is float64), never less: in bfloat16 sigma would be 0 at
    the clean end and only 192 of 1,000 levels would stay distinct.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.as_tensor(part).to(x.device, dtype).reshape((-1,) + (1,) * (x.ndim - 1))


def typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; where it is, in a fifth of the time that ``Tensor.to`` takes to see."""
    return x if x.dtype == dtype else x.to(dtype)


class Level(NamedTuple):
    """(alpha, sigma) of a batch, tensors of shape ``b`` (or scalars), float64 unless cast; and
    their derivatives by t where a process gives them.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor | None = None
    d_sigma: Tensor | None = None

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2

    @property
    def logsnr(self) -> Tensor:
        """log(alpha^2 / sigma^2); -inf at zero terminal SNR."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def map(self, function: Callable[[Tensor], Tensor]) -> Level:
        """``function`` applied to every part."""
        alpha, sigma, *rates = self
        d_alpha, d_sigma = (None if rate is None else function(rate) for rate in rates)
        return Level(function(alpha), function(sigma), d_alpha, d_sigma)

    def like(self, x: Tensor) -> Level:
        """The same level, every part broadcast over ``x``."""
        return self.map(lambda part: broadcast(part, x))
