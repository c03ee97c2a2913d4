"""Stable unCLIP small enough for every test: Stable Diffusion of ``tiny``, told an embedding of 32
numbers, with or without a prior of texts of 24 tokens. The weights are a pure function of ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import tiny

WIDTH, SIDE = tiny.WIDTH, 16


def vision() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            patch_size=8, image_size=SIDE, projection_dim=WIDTH,
        )
    )  # fmt: skip


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )


def prior() -> PriorTransformer:
    network = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH,
        num_embeddings=tiny.LENGTH,
    )  # fmt: skip
    for part in (network.positional_embedding, network.prd_embedding, network.clip_mean):
        torch.nn.init.normal_(part)
    torch.nn.init.uniform_(network.clip_std, 0.5, 2)
    return network


def components(*, whole: bool, seed: int = 0) -> dict[str, Any]:
    """Components of ``StableUnCLIPImg2ImgPipeline``, and beside them, where it is ``whole``, those
    of ``StableUnCLIPPipeline``, in ``eval`` mode.
    """
    parts = tiny.components("v", seed)
    own = {key: value for key, value in parts["unet"].config.items() if not key.startswith("_")}
    own |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        unet, normaliser = UNet2DConditionModel(**own), StableUnCLIPImageNormalizer(WIDTH)
        for name, parameter in unet.named_parameters():
            if "class_embedding" in name or "attn2.to_v" in name:  # make both heard
                parameter.data *= 3
        torch.nn.init.normal_(normaliser.mean)
        torch.nn.init.uniform_(normaliser.std, 0.5, 2)
        parts |= {"unet": unet, "image_encoder": vision(), "image_normalizer": normaliser}
        if whole:
            shape = CLIPTextConfig.from_dict(parts["text_encoder"].config.to_dict())
            parts |= {
                "prior": prior(),
                "prior_text_encoder": CLIPTextModelWithProjection(shape),
                "prior_tokenizer": parts["tokenizer"],
                "prior_scheduler": DDPMScheduler(
                    beta_schedule="squaredcos_cap_v2", prediction_type="sample",
                    clip_sample_range=5.0,
                ),
            }  # fmt: skip
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return {**parts, "image_noising_scheduler": noising, "feature_extractor": processor()}
