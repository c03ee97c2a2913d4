"""Draws ``papers.png``: pictures of every model of configs/papers, not picked.

    python assets/gallery/papers.py

Each is drawn as the header of its config measures it, from seeds 0 to 15; those that know classes
are asked for the ten digits in turn, ``ldm`` for emoji evenly spread over those that it has learnt.
"""

import argparse
from pathlib import Path

import diffusers
from PIL import Image

from ldm.data.images import to_image
from ldm.data.items import evenly_spaced
from ldm.demo.digits import NAMES
from ldm.demo.emoji import EmojiData
from ldm.evaluation import sheets
from ldm.pipeline import LatentDiffusionPipeline

# Name: run, sampler, steps, guidance.
PAPERS: dict[str, tuple[str, str, int, float]] = {
    "DDPM": ("ddpm", "ddpm", 100, 1),
    "DDIM (the network of DDPM)": ("ddpm", "ddim", 20, 1),
    "Improved DDPM": ("improved_ddpm", "ddpm", 100, 1),
    "NCSN": ("ncsn", "langevin", 50, 1),
    "Score SDE, variance preserving": ("score_sde_vp", "sde", 100, 1),
    "Score SDE, variance exploding": ("score_sde_ve", "pc", 50, 1),
    "EDM": ("edm", "ode-heun", 18, 1),
    "Flow matching": ("flow_matching", "ode-heun", 25, 1),
    "Guided diffusion": ("guided_diffusion", "ddpm", 100, 1),
    "Classifier-free guidance": ("cfg", "ddpm", 100, 1.3),
}
COUNT, SIDE = 16, 48


def emoji() -> list[str]:
    """Captions of ``ldm``, as its config chooses them."""
    source = EmojiData(styles=("twemoji",), limit=128, hold_out=False, composed=False)
    return [
        source.examples[n].captions[0] for n in evenly_spaced(range(len(source.examples)), COUNT)
    ]


def main() -> None:
    """Writes the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"))
    runs = parser.parse_args().runs
    diffusers.utils.logging.disable_progress_bar()
    told, rows = [], []
    for name, (run, sampler, steps, guidance) in {
        **PAPERS,
        "Latent diffusion": ("ldm", "ddim", 30, 3.0),
    }.items():
        pipe = LatentDiffusionPipeline.from_pretrained(runs / run / "final")
        pipe.set_progress_bar_config(disable=True)
        prompts = [""] * COUNT
        if pipe.config.classes:
            prompts = [NAMES[n % len(NAMES)] for n in range(COUNT)]
        elif pipe.text_encoder is not None:
            prompts = emoji()
        drawn = pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            seed=0,
            output_type="pt",
        ).images
        how = Image.Resampling.NEAREST if drawn.shape[-1] < SIDE else Image.Resampling.LANCZOS
        rows.append([to_image(x * 2 - 1).resize((SIDE, SIDE), how) for x in drawn])
        told.append(f"{name}: {sampler}, {steps} steps")
    page = sheets.sheet(rows, told, columns=1, scale=1)
    sheets.save(page, Path(__file__).with_name("papers.png"))


if __name__ == "__main__":
    main()
