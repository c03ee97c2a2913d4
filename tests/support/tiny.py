"""A pipeline folder small enough for every test: random weights, 16 x 16 pictures, a byte
tokenizer.

The weights are a pure function of ``seed``; nothing is read or downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.diffusion import DiscreteVP, scheduler_config
from ldm.models.clip_size import ClipSize
from ldm.models.tokenizer import train_tokenizer

WIDTH = 32
LENGTH = 24
LATENT = (4, 8, 8)
SIZE = 16


def tokenizer() -> CLIPTokenizer:
    """512 byte tokens, no merges, 24 tokens a text."""
    return train_tokenizer([], vocab_size=514, max_length=LENGTH)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT[0],
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=0.18215,
    )


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            projection_dim=WIDTH,
        )
    )


def clip(path: Path) -> tuple[Path, CLIPModel]:
    """The texts' side of a pipeline folder, a picture tower for pictures of 16 x 16 beside it, and
    the model they are.
    """
    words = tokenizer()
    size = ClipSize(text_width=16, text_layers=1, text_heads=2, vision_width=16, vision_layers=1,
                    vision_heads=2, patch=4, size=SIZE, projection=8)  # fmt: skip
    towers = size.build(words, seed=0)
    towers.save_text(path / "text_encoder")
    towers.save_vision(path / "image_encoder")
    words.save_pretrained(path / "tokenizer")
    return path, towers.model.eval()


def scheduler(target: str = "eps", **process: Any) -> DDIMScheduler:
    """The scheduler that a saved folder holds."""
    config = scheduler_config(DiscreteVP(**process), target)  # type: ignore[arg-type]
    return DDIMScheduler.from_config({**config, "steps_offset": 1, "clip_sample": False})


def components(target: str = "eps", seed: int = 0, **process: Any) -> dict[str, Any]:
    """Arguments of ``LatentDiffusionPipeline``, in ``eval`` mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer()
        parts = {"vae": vae(), "text_encoder": text_encoder(words), "unet": unet()}
        # A fresh U-Net hardly listens to the text: make the condition matter.
        for name, parameter in parts["unet"].named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter.data *= 4
    for part in parts.values():
        part.eval()
    return {**parts, "tokenizer": words, "scheduler": scheduler(target, **process)}


def second() -> dict[str, Any]:
    """Components of a model of the form of Stable Diffusion 2, which predicts v."""
    parts = components("v")
    own = {key: value for key, value in parts["unet"].config.items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts["unet"] = UNet2DConditionModel(**own | {"use_linear_projection": True}).eval()
    return parts


def aligned(pipe: Any) -> Any:
    """``pipe`` with its weights in memory of their own: those of a file begin where it has them,
    and kernels for other beginnings round otherwise.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(target: str = "eps", seed: int = 0, **process: Any) -> Any:
    from ldm.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline(**components(target, seed, **process))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def folder(path: Path, target: str = "eps", **process: Any) -> Path:
    """A pipeline saved under ``path``."""
    pipeline(target, **process).save_pretrained(path)
    return path
