"""A pipeline folder with the proportions of Stable Diffusion 1, small enough for a CPU.

At 512 x 512 SD 1's U-Net costs 803 GFLOP forward, its autoencoder 1,117 to encode and its text
encoder 13. So of what a training step computes (three forward passes of the U-Net, or two where no
weight gradients are taken, an encoded picture and a caption) a perfect cache saves a third or more.
The parts below are a hundred times smaller, in the same proportions, at 128 x 128.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.config.schema import UNetShape, VaeShape
from ldm.data.images import ImageTransform, to_pixels
from ldm.demo.shapes import ShapesData
from ldm.diffusion import DiscreteVP, scheduler_config
from ldm.families.networks import initialised
from ldm.families.unet import make_unet
from ldm.families.vae import make_vae
from ldm.models.attention import set_attention
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import TextConditioner
from ldm.models.lora import attach
from ldm.models.tokenizer import train_tokenizer
from ldm.pipeline import LatentDiffusionPipeline

SIZE, LATENT, LENGTH, WIDTH = 128, 32, 77, 128
# Attention where a CPU does it as fast as convolutions, so that time has the proportions too.
UNET = UNetShape(
    block_out_channels=(64, 128, 256),
    attention=(False, True, True),
    attention_head_dim=(1, 2, 4),
    norm_num_groups=16,
)
VAE = VaeShape(block_out_channels=(48, 112, 112), norm_num_groups=8)
RANK = 4  # of the LoRA, as the peer has it by default
SD1 = {"unet": 803, "vae": 1117, "text": 13}


def pictures(folder: Path, count: int, seed: int) -> Path:
    """``count`` captioned pictures, of the size they are trained at, as an image folder."""
    source = ShapesData(count=count, size=SIZE, seed=seed)
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as table:
        for number in range(count):
            name = f"{number:05d}.png"
            source.load(number).save(folder / name)
            row = {"file_name": name, "text": source.caption(number, None)}
            table.write(json.dumps(row) + "\n")
    return folder


def captioned(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Pixels ``n 3 h w`` in [-1, 1] and captions of what ``pictures`` wrote."""
    from PIL import Image

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    transform = ImageTransform(size=SIZE)
    x = [to_pixels(transform(Image.open(folder / row["file_name"]))) for row in rows]
    return torch.stack(x), [row["text"] for row in rows]


def model(folder: Path, trained_on: Path) -> LatentDiffusionPipeline:
    """The pipeline, from random init, saved into ``folder``."""
    x, captions = captioned(trained_on)
    tokenizer = train_tokenizer(captions, vocab_size=600, max_length=LENGTH)
    with initialised(0, "text_encoder"):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    vae = make_vae(VAE, 0)
    with torch.no_grad():
        spread = VaeCodec(vae).encode(x[:16]).mean.std()
    vae.register_to_config(scaling_factor=1 / float(spread))
    with initialised(0, "unet"):
        unet = make_unet(UNET, VAE.latent_channels, WIDTH, LATENT)
    scheduler = DDIMScheduler(
        **scheduler_config(DiscreteVP(), "eps"), clip_sample=False, steps_offset=1
    )
    pipe = LatentDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler)
    pipe.save_pretrained(folder)
    return pipe


@dataclass(frozen=True)
class Costs:
    """What the parts of a training step cost: GFLOP an image, or CPU seconds a batch."""

    forward: float
    step: float
    vae: float
    text: float

    @property
    def limit(self) -> float:
        """How much faster a step is whose latents and texts cost nothing."""
        return (self.step + self.vae + self.text) / self.step


def _parts(pipe: LatentDiffusionPipeline, batch: int, bfloat16: bool) -> dict[str, Callable]:
    """Every part of a training step as a call, frozen parts as the peer runs them."""
    unet, vae, text = pipe.unet, pipe.vae, pipe.text_encoder
    with torch.device(unet.device):
        x, z = torch.randn(batch, 3, SIZE, SIZE), torch.randn(batch, 4, LATENT, LATENT)
        ids, t = torch.randint(500, (batch, LENGTH)), torch.randint(1000, (batch,))
        tokens = torch.randn(batch, LENGTH, WIDTH)
    if bfloat16:
        vae, text, x = vae.to(torch.bfloat16), text.to(torch.bfloat16), x.to(torch.bfloat16)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return unet(z, t, encoder_hidden_states=tokens).sample.float()

    def step() -> None:
        forward().square().mean().backward()
        unet.zero_grad()

    return {
        "forward": forward,
        "step": step,
        "vae": torch.no_grad()(lambda: vae.encode(x)),
        "text": torch.no_grad()(lambda: text(ids)),
    }


def _prepared(folder: Path, lora: bool) -> LatentDiffusionPipeline:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    if lora:
        pipe.unet.requires_grad_(False)
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        attach(pipe.unet, targets, rank=RANK, alpha=float(RANK), dora=False)
    return pipe


def gigaflops(folder: Path, lora: bool) -> Costs:
    """Counted for one image."""

    def count(call: Callable) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e9

    pipe = _prepared(folder, lora).to("meta")
    return Costs(**{name: count(call) for name, call in _parts(pipe, 1, False).items()})


def seconds(folder: Path, lora: bool, batch: int, bfloat16: bool, rounds: int = 2) -> Costs:
    """CPU seconds a batch, medians over interleaved rounds after one to warm up."""
    pipe = _prepared(folder, lora)
    set_attention(pipe.unet, "auto", torch.device("cpu"), bfloat16=bfloat16)
    parts = _parts(pipe, batch, bfloat16)
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, call in parts.items():
            start = time.process_time()
            call()
            if number:
                taken[name].append(time.process_time() - start)
    return Costs(**{name: median(values) for name, values in taken.items()})


@torch.no_grad()
def held_out_loss(pipe: LatentDiffusionPipeline, folder: Path, levels: int = 5) -> float:
    """Mean squared error of eps in float32 over the pictures of ``folder`` at ``levels`` fixed
    times, every picture with the same noise each time this is called.
    """
    x, captions = captioned(folder)
    process, codec = DiscreteVP(), VaeCodec(pipe.vae)
    moments = codec.encode(x)
    z = codec.sample(moments, torch.zeros_like(moments.mean))
    cond = TextConditioner(pipe.tokenizer, pipe.text_encoder).encode(captions)
    total = 0.0
    for number in range(levels):
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(number))
        t = torch.full((len(z),), (number + 0.5) / levels, dtype=torch.float64)
        x_t = process.perturb(z, eps, t)
        y = pipe.unet(x_t, process.timestep(t), encoder_hidden_states=cond.tokens).sample
        total += float((y - eps).square().mean()) / levels
    return total
