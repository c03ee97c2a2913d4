"""A model of Flux.1's form, small enough for every test: a CLIP that pools, a T5, and a transformer
of two streams and then of one. The weights are a pure function of ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tiny
import tiny_sd3
from ldm.models.unigram import train_unigram

WIDTH, JOINT, LENGTH = 24, tiny_sd3.JOINT, tiny_sd3.LENGTH
SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 20}


def clip(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tiny.LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def transformer(*, dev: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * tiny_sd3.CHANNELS,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        pooled_projection_dim=WIDTH,
        guidance_embeds=dev,
        axes_dims_rope=(4, 2, 2),
    )


def components(seed: int = 0, *, dev: bool = True) -> dict[str, Any]:
    """Components of ``FluxPipeline``, in ``eval`` mode: with the noise and the embedding of
    guidance of ``dev``, or as schnell without.
    """
    words = tiny.tokenizer()
    second = train_unigram(["a red apple", "two dogs"] * 2, 300, LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {
            "vae": tiny_sd3.vae(),
            "text_encoder": clip(words),
            "text_encoder_2": tiny_sd3.t5(len(second)),
            "transformer": transformer(dev=dev),
        }
        # Fresh weights hardly listen to what they are told: make the condition matter.
        for name, parameter in parts["transformer"].named_parameters():
            if "context" in name or "norm" in name or "time_text" in name:
                parameter.data *= 1.5
    for part in parts.values():
        part.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTED if dev else {"shift": 1.0})
    return {**parts, "tokenizer": words, "tokenizer_2": second, "scheduler": scheduler}
