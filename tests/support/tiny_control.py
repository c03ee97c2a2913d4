"""Networks beside a tiny U-Net that say something, as trained ones do; a pure function of
``seed``.
"""

from __future__ import annotations

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn


def controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """For hints twice as large as latents along each side."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        last = [net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block]
        for zero in [*last, *net.controlnet_down_blocks]:
            nn.init.normal_(zero.weight, std=0.3)
    return net.eval()
