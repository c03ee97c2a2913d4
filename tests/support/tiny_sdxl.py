"""A model of SDXL's form, small enough for every test: two text towers, and a U-Net of the blocks
that SDXL publishes, told size and crop. The weights are a pure function of ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import tiny

WIDTHS = (tiny.WIDTH, 48)
"""Of tokens, of the two towers."""
PROJECTION = 16


NUMBERS = 8  # width of the embedding of each number that it is told


def unet(*, refiner: bool = False, published: bool = True) -> UNet2DConditionModel:
    """Of the blocks that SDXL publishes, or of two levels alone."""
    levels = 3 if published else 2
    attending = ["DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)]
    return UNet2DConditionModel(
        sample_size=tiny.LATENT[1],
        in_channels=tiny.LATENT[0],
        out_channels=tiny.LATENT[0],
        block_out_channels=(16, 32, 32)[:levels],
        layers_per_block=2 if published else 1,
        down_block_types=tuple(attending),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attending)),
        transformer_layers_per_block=(1, 1, 2)[-levels:],
        attention_head_dim=(2, 4, 4)[:levels],
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=WIDTHS[1] if refiner else sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=NUMBERS,
        projection_class_embeddings_input_dim=(5 if refiner else 6) * NUMBERS + PROJECTION,
    )


def text_encoder_2(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTHS[1],
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tiny.LENGTH,
            hidden_act="gelu",
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            projection_dim=PROJECTION,
        )
    )


def components(seed: int = 0, *, refiner: bool = False, published: bool = True) -> dict[str, Any]:
    """Components of ``StableDiffusionXLPipeline``, or of a refiner, in ``eval`` mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words, others = tiny.tokenizer(), tiny.tokenizer()
        others.pad_token = "!"
        parts = {
            "vae": tiny.vae(),
            "text_encoder": None if refiner else tiny.text_encoder(words),
            "text_encoder_2": text_encoder_2(others),
            "unet": unet(refiner=refiner, published=published),
        }
        # A fresh U-Net hardly listens to what it is told: make the condition matter.
        for name, parameter in parts["unet"].named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name or "add_embedding" in name:
                parameter.data *= 4
    for part in parts.values():
        if part is not None:
            part.eval()
    tokenizers = {"tokenizer": None if refiner else words, "tokenizer_2": others}
    return {**parts, **tokenizers, "scheduler": tiny.scheduler()}


def stock(parts: dict[str, Any] | None = None) -> StableDiffusionXLPipeline:
    """The stock pipeline over ``components``."""
    pipe = StableDiffusionXLPipeline(**(parts or components()), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
