"""The network that predicts, behind one call: (x_t, timestep, condition) -> y."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.diffusion import Condition


class UNetDenoiser(nn.Module):
    """``UNet2DConditionModel`` as a ``Denoiser``.

    As in stock Stable Diffusion the mask of padding tokens does not reach cross-attention.

    Args:
        unet: the network, used as it is.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x_t: Float[Tensor, "b c h w"], timestep: Shaped[Tensor, "..."], cond: Condition
    ) -> Float[Tensor, "b y h w"]:
        """Output ``b y h w``, y = c (2 c with a learned variance); ``timestep`` ``b`` or ``()``."""
        # Not below float32: random Fourier features are turns of up to hundreds of radians.
        return self.unet(x_t, timestep.float(), encoder_hidden_states=cond.tokens).sample
