"""How close a picture is to the true one: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, ``b``, of ``b c h w`` pictures.

    10 log10(data_range^2 / mse); ``data_range`` is 2 for pixels in [-1, 1].
    """
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def ssim(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity per picture, ``b`` (Wang et al. 2004, eq. 13), of ``b c h w`` pictures.

    The original's settings: 11x11 Gaussian window of std 1.5, K1 = 0.01, K2 = 0.03, valid
    positions, mean over positions and channels.
    """
    x, y = x.double(), y.double()
    channels = x.shape[1]
    line = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    line = (-(line**2) / (2 * 1.5**2)).exp()
    line = line / line.sum()
    window = (line[:, None] * line[None]).expand(channels, 1, 11, 11)

    def smooth(values: Tensor) -> Tensor:
        return conv2d(values, window, groups=channels)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x**2
    var_y = smooth(y * y) - mean_y**2
    cov = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(1)
