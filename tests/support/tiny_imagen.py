"""A cascade of DeepFloyd IF's form, small enough for every test: a T5, a U-Net of 8 x 8 pixels,
and one that enlarges 8 to 16. The weights are a pure function of ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import tiny_sd3
from ldm.models.unigram import train_unigram

BASE, LARGE = 8, 16


def unet(side: int, *, enlarges: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=6 if enlarges else 3,
        out_channels=6,
        block_out_channels=(16, 32),
        layers_per_block=(0, 1) if enlarges else 1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        act_fn="gelu",
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        encoder_hid_dim=tiny_sd3.JOINT,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
        class_embed_type="timestep" if enlarges else None,
    )


def components(*, enlarges: bool, seed: int = 0, **scheduler: Any) -> dict[str, Any]:
    """Components of ``IFPipeline``, or of ``IFSuperResolutionPipeline``, in ``eval`` mode."""
    words = train_unigram(["a red apple", "two dogs"] * 2, 300, 80)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "text_encoder": tiny_sd3.t5(len(words)),
            "unet": unet(LARGE if enlarges else BASE, enlarges=enlarges),
        }
        # Fresh weights hardly listen to what they are told: make the condition matter.
        for name, parameter in parts["unet"].named_parameters():
            if "encoder_hid" in name or "add_" in name or "class_emb" in name:
                parameter.data *= 3
    for part in parts.values():
        part.eval()
    noise = {"beta_schedule": "squaredcos_cap_v2"}
    stepping = {
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
    }
    parts["scheduler"] = DDPMScheduler(**noise | stepping | scheduler)
    if enlarges:
        parts["image_noising_scheduler"] = DDPMScheduler(**noise)
    return {**parts, "tokenizer": words}
