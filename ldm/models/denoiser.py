"""The network that predicts, behind one call: (x_t, timestep, condition) -> y."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.diffusion import Condition
from ldm.models.wrapped import bare


class UNetDenoiser(nn.Module):
    """``UNet2DConditionModel``, or ``UNet2DModel`` where no text is read, as a ``Denoiser``.

    As in stock Stable Diffusion the mask of padding tokens does not reach cross-attention.

    Args:
        unet: one of these, used as it is, be it compiled or wrapped by peft.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x_t: Float[Tensor, "b c h w"], timestep: Shaped[Tensor, "..."], cond: Condition
    ) -> Float[Tensor, "b y h w"]:
        """Output ``b y h w``, y = c (2 c with a learned variance); ``timestep`` ``b`` or ``()``."""
        # Not below float32: random Fourier features are turns of up to hundreds of radians.
        timestep = timestep.float()
        inside = bare(self.unet)
        if isinstance(inside, UNet2DConditionModel):
            return self.unet(x_t, timestep, encoder_hidden_states=cond.tokens).sample
        if inside.config.time_embedding_type == "fourier":
            # This one takes the logarithm of a sigma itself, and divides its output by it, so that
            # a score comes out. The process says log(sigma) / 4.
            timestep = (4 * timestep).exp()
        labels = cond.extra["label"] if inside.config.num_class_embeds else None
        return self.unet(x_t, timestep, class_labels=labels).sample
