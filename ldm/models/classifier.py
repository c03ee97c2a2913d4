"""A classifier that knows noise: log p(label | x_t) at every level.

The half of a U-Net that goes down, with its embedding of time, a mean over all places, and one
linear layer (Dhariwal & Nichol 2021, section 4). The blocks are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2D
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Saved and opened as every network of diffusers is.

    Args:
        labels: names of the classes, in the order of the logits.
        in_channels: of what it sees, latents or pixels.
        block_out_channels: channels per resolution, each half the one before.
        layers_per_block: residual layers at each.
        norm_num_groups: groups of every GroupNorm.
    """

    @register_to_config
    def __init__(
        self,
        labels: Sequence[str],
        in_channels: int = 4,
        block_out_channels: Sequence[int] = (64, 128, 160),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
    ) -> None:
        super().__init__()
        width, *_, last = (*block_out_channels, block_out_channels[-1])
        wide = 4 * width
        self.time = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(width, wide)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, before = nn.ModuleList(), width
        for number, channels in enumerate(block_out_channels, 1):
            self.down.append(
                DownBlock2D(
                    in_channels=before,
                    out_channels=channels,
                    temb_channels=wide,
                    num_layers=layers_per_block,
                    resnet_groups=norm_num_groups,
                    add_downsample=number < len(block_out_channels),
                )
            )
            before = channels
        self.middle = UNetMidBlock2D(
            in_channels=last, temb_channels=wide, resnet_groups=norm_num_groups,
            attention_head_dim=last,
        )  # fmt: skip
        self.last = nn.Sequential(nn.GroupNorm(norm_num_groups, last), nn.SiLU())
        self.logits = nn.Linear(last, len(labels))

    def forward(
        self, x: Float[Tensor, "b c h w"], timestep: Shaped[Tensor, "..."]
    ) -> Float[Tensor, "b k"]:
        """Logits of ``x`` = x_t / sqrt(alpha^2 + sigma^2) at ``timestep``, ``b`` or ``()``."""
        time = self.time(timestep.reshape(-1).expand(len(x))).to(x.dtype)
        embedded, x = self.embedding(time), self.first(x)
        for block in self.down:
            x, _ = block(x, embedded)
        return self.logits(self.last(self.middle(x, embedded)).mean((2, 3)))
