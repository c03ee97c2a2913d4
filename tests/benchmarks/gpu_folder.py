"""What ``gpu.py`` trains: a pipeline of the shapes of Stable Diffusion 1.5 from random init, and
captioned pictures.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.models.tokenizer import train_tokenizer
from ldm.pipeline import LatentDiffusionPipeline

WORDS = [f"a picture of {a} {b}" for a in ("red", "blue", "old", "new") for b in ("cats", "hills")]


def pictures(folder: Path, count: int, side: int) -> None:
    """``count`` pictures of random colours, each with one of ``WORDS``."""
    folder.mkdir(exist_ok=True)

    def draw(number: int) -> None:
        few = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        large = Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC)
        large.save(folder / f"{number:05d}.jpg", quality=90)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(draw, range(count)))
    lines = [
        json.dumps({"file_name": f"{n:05d}.jpg", "text": WORDS[n % len(WORDS)]})
        for n in range(count)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def pipeline(folder: Path, side: int, *, tiny: bool) -> int:
    """Saves the pipeline, of other widths if it is to be ``tiny``; parameters of its U-Net."""
    words, width = train_tokenizer(WORDS, 600, 77), 32 if tiny else 768
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel(
            sample_size=side // 8,
            block_out_channels=(32,) * 4 if tiny else (320, 640, 1280, 1280),
            layers_per_block=1 if tiny else 2,
            cross_attention_dim=width,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
            layers_per_block=1 if tiny else 2,
            latent_channels=4,
            sample_size=side,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words) if tiny else 49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2 if tiny else 12,
                num_attention_heads=4 if tiny else 12,
                max_position_embeddings=77,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    LatentDiffusionPipeline(vae, text, words, unet, DDIMScheduler(**schedule)).save_pretrained(
        folder
    )
    return sum(p.numel() for p in unet.parameters())
