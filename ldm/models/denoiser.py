"""The network that predicts, behind one call: (x_t, timestep, condition) -> y."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm.diffusion import Condition


class UNetDenoiser(nn.Module):
    """``UNet2DConditionModel`` as a ``Denoiser``.

    Args:
        unet: the network, used as it is.
        text_mask: hand the condition's mask to cross-attention. Stock Stable Diffusion does not.
    """

    def __init__(self, unet: UNet2DConditionModel, text_mask: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.text_mask = text_mask

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Output ``b c h w`` for ``x_t`` of that shape and ``timestep`` of shape ``b`` or
        ``()``.
        """
        mask = cond.mask if self.text_mask else None
        return self.unet(
            x_t, timestep, encoder_hidden_states=cond.tokens, encoder_attention_mask=mask
        ).sample
