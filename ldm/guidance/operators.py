"""Operators of linear inverse problems on pictures ``b c h w``.

Each is a plain function; behind a decoder, ``lambda z: A(codec.decode(z))``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from ldm.guidance.inverse import Operator

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in the gray of a picture (ITU-R BT.601)."""


def inpainting(mask: Tensor) -> Operator:
    """What is known of a picture: ``mask`` (1 where it is, else 0) times it, broadcast."""
    return lambda x: mask.to(x) * x


def super_resolution(factor: int) -> Operator:
    """Means of squares of ``factor`` pixels, ``b c h/factor w/factor``."""
    return lambda x: avg_pool2d(x, factor)


def colourisation(weights: tuple[float, float, float] = LUMA) -> Operator:
    """Gray, ``b 1 h w``, of red, green and blue."""

    def gray(x: Tensor) -> Tensor:
        return (x * torch.tensor(weights).to(x)[:, None, None]).sum(1, keepdim=True)

    return gray


def deblurring(std: float) -> Operator:
    """Gaussian blur of ``std`` pixels, cut off at three; the border is repeated."""
    reach = int(3 * std + 0.5)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    line = (-((line / std) ** 2) / 2).exp()
    line = line / line.sum()

    def blurred(x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = line.to(x).expand(channels, 1, 1, -1)
        x = pad(x, (reach,) * 4, mode="replicate")
        return conv2d(conv2d(x, kernel, groups=channels), kernel.mT, groups=channels)

    return blurred
