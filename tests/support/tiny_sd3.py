"""A model of SD3.5's form, small enough for every test: two CLIP towers with projections, a T5, and
a transformer of two streams. The weights are a pure function of ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

import tiny
from ldm.models.unigram import train_unigram

WIDTHS, PROJECTIONS, JOINT = (32, 16), (16, 24), 64
CHANNELS, SIDE, LENGTH = 16, 8, 20


def clip(words: CLIPTokenizer, number: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTHS[number],
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tiny.LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            projection_dim=PROJECTIONS[number],
        )
    )


def t5(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=JOINT,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        caption_projection_dim=16,
        pooled_projection_dim=sum(PROJECTIONS),
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def components(seed: int = 0, *, late: bool = True) -> dict[str, Any]:
    """Components of ``StableDiffusion3Pipeline``, in ``eval`` mode; without its T5 unless
    ``late``.
    """
    words, others = tiny.tokenizer(), tiny.tokenizer()
    others.pad_token = "!"
    third = train_unigram(["a red apple", "two dogs"] * 2, 300, LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {
            "vae": vae(),
            "text_encoder": clip(words, 0),
            "text_encoder_2": clip(others, 1),
            "text_encoder_3": t5(len(third)) if late else None,
            "transformer": transformer(),
        }
        # Fresh weights hardly listen to what they are told: make the condition matter.
        for name, parameter in parts["transformer"].named_parameters():
            if "context" in name or "norm" in name or "time_text" in name:
                parameter.data *= 3
    for part in parts.values():
        if part is not None:
            part.eval()
    tokenizers = {"tokenizer": words, "tokenizer_2": others, "tokenizer_3": third if late else None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {**parts, **tokenizers, "scheduler": scheduler}
