"""``flux``: Flux.1 dev and schnell (Black Forest Labs 2024), rectified flows on an MM-DiT whose
later layers are of one stream.

    tokens = those of tower 2, a T5
    pooled = what tower 1, a CLIP, pools
    x      = 2 x 2 latent cells a token, at their row and column (rotary positions; texts are at 0)

Dev is distilled from a guided model: the scale of guidance is an input of the network, and no text
is steered away from. Training tells it 1. Schnell is distilled to few steps and has no such input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel, T5Tokenizer

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.diffusion.schedulers import FLOW_EULER
from ldm.errors import ConfigError
from ldm.families.flow import ATTENTION, LONGEST, check_run, left_out, taken
from ldm.families.index import OF_IMAGEN, OF_SD, OF_SDXL
from ldm.families.model import Family, Model, Tower
from ldm.models.mmdit import initialise
from ldm.models.wrapped import bare

CLIP, T5 = "text_encoder", "text_encoder_2"
LENGTH = 512
"""Tokens of the T5, as in stock where nothing else is asked for; fewer where its tokenizer says."""
PATCH = 2
SIDE = 128
"""Side of a latent that stock draws where nothing is asked for."""
STATED = "_sample_size"
"""Where a folder states another: stock passes over keys with an underscore."""
UNGUIDED = 1.0


class Flux(Family):
    """A CLIP that pools, a T5, and a transformer of two streams and then of one."""

    name = "flux"
    stock = ("FluxPipeline",)
    network = "transformer"
    towers = (
        Tower(CLIP, "tokenizer", CLIPTextModel),
        Tower(T5, "tokenizer_2", T5EncoderModel, None, None, T5Tokenizer, LENGTH),
    )
    flow = FLOW_EULER
    pooled = True
    longest = LONGEST
    encoded = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
    targets = ATTENTION
    drawing = {"num_inference_steps": 28, "guidance_scale": 3.5}
    reads = FluxTransformer2DModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There is a ``FluxTransformer2DModel``."""
        return isinstance(bare(parts.get("transformer")), FluxTransformer2DModel)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``FluxTransformer2DModel`` that says 0."""
        shape = config.transformer
        assert shape is not None
        left_out(shape, self.name, "patch_size", "positions", "dual_attention", "qk_norm")
        check_run(config, model, PATCH)
        tokens, pooled = _widths(model)
        if shape.head_dim % 2 or shape.head_dim < 6:
            raise ConfigError(f"transformer.head_dim {shape.head_dim}: an even number, 6 at least")
        network = FluxTransformer2DModel(
            in_channels=model.codec.channels * PATCH**2,
            num_layers=shape.layers,
            num_single_layers=shape.single_layers,
            attention_head_dim=shape.head_dim,
            num_attention_heads=shape.heads,
            joint_attention_dim=tokens,
            pooled_projection_dim=pooled,
            guidance_embeds=shape.guidance,
            axes_dims_rope=_axes(shape.head_dim),
        )
        initialise(network, told=network.time_text_embed, output=network.proj_out)
        return network

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of the autoencoder, widths those of the text encoders."""
        check_run(config, model, PATCH)
        has, (tokens, pooled) = network.config, _widths(model)
        for what, mine, written in (
            ("latents of 2 x 2 cells", has.in_channels, model.codec.channels * PATCH**2),
            ("tokens", has.joint_attention_dim, tokens),
            ("pooled text", has.pooled_projection_dim, pooled),
        ):
            if mine != written:
                raise ConfigError(
                    f"the transformer of {config.model} reads {what} of width {mine}, and here they"
                    f" are {written}: it needs the parts that it was trained with"
                )

    def join(self, said: Sequence[Condition], networks: Mapping[str, Any]) -> Condition:
        """Tokens of the T5, and what the CLIP pools."""
        clip, t5 = said
        return Condition(t5.tokens, None, clip.pooled)

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens are the second stream; pooled text and scale of guidance join the embedding of the
        timestep.
        """
        b, c, h, w = x_t.shape
        rows, columns = h // PATCH, w // PATCH
        cells = x_t.reshape(b, c, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        guidance = None
        if bare(network).config.guidance_embeds:
            guidance = cond.extra.get("guidance")
            guidance = x_t.new_full((b,), UNGUIDED) if guidance is None else guidance
        said = network(
            cells.reshape(b, rows * columns, c * PATCH**2),
            timestep=timestep.expand(b) / 1000,  # times which the network multiplies it
            guidance=guidance,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x_t.device),
            img_ids=_places(rows, columns, x_t.device),
        ).sample
        said = said.reshape(b, rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return said.reshape(b, -1, h, w)

    def patch(self, network: nn.Module) -> int:
        """2, whatever ``patch_size`` says: its tokens are 2 x 2 cells before it sees them."""
        return PATCH

    def channels(self, network: nn.Module) -> int:
        """Of one of the cells that its tokens are made of."""
        return bare(network).config.in_channels // PATCH**2

    def side(self, network: nn.Module) -> int:
        """What the folder states, else that of stock."""
        return bare(network).config.get(STATED, SIDE)

    def state_side(self, network: Any, side: int) -> None:
        """Under a key that stock passes over: its networks have no size."""
        network.register_to_config(**{STATED: side})

    def spaced(self, steps: int) -> list[float]:
        """From 1 to one step above 0 by equal steps, before they are shifted."""
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()

    def hears(self, network: nn.Module) -> bool:
        """Whether it is dev, or distilled as that is."""
        return bool(bare(network).config.guidance_embeds)

    def guided(self, scale: float, asked: dict[str, Any], *, negative: bool, heard: bool) -> float:
        """``true_cfg_scale`` where there is a negative prompt: ``guidance_scale`` is what the
        network is told.
        """
        true = asked.pop("true_cfg_scale", 1.0)
        if isinstance(true, bool) or not isinstance(true, (int, float)) or not math.isfinite(true):
            raise ValueError(f"true_cfg_scale must be a finite number, not {true!r}")
        return float(true) if negative else 1.0

    def taken(self, steps: int, strength: float) -> int:
        """As in stock rounded up."""
        return taken(steps, strength)

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``FluxPipeline``."""
        others = (*OF_SD, *OF_SDXL, *OF_IMAGEN, "classes", "unet", "text_encoder_3", "tokenizer_3")
        kept = {key: value for key, value in index.items() if key not in others}
        return kept | {"_class_name": self.stock[0]}


def _axes(head_dim: int) -> tuple[int, int, int]:
    """Of a head's width an eighth for nothing, the rest in halves for row and column (16, 56, 56 of
    128).
    """
    first = max(2, head_dim // 16 * 2)
    each = (head_dim - first) // 4 * 2
    return head_dim - 2 * each, each, each


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """0, row and column of every token, ``rows * columns 3``."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return grid.reshape(-1, 3)


def _widths(model: Model) -> tuple[int, int]:
    """Of the tokens, and of the pooled text."""
    if missing := [tower.part for tower in Flux.towers if model.networks.get(tower.part) is None]:
        raise ConfigError(f"text: the family flux needs a CLIP and a T5; there is no {missing[0]}")
    return model.networks[T5].config.d_model, model.networks[CLIP].config.hidden_size
