"""Draws ``interpolation.png``: from one emoji to another through the noise that they become.

    python assets/gallery/interpolation.py

The pictures at both ends are none that ldm-small was trained on. They are carried to noise along
the probability-flow ODE, joined there on an arc, and carried back, with captions mixed alike; so
the ends of a row are what comes back of the true pictures beside them.
"""

from pathlib import Path

import torch
from PIL import Image

from ldm.demo.emoji import EmojiData
from ldm.diffusion import Condition, predictor, process_of, target_of
from ldm.families import FamilyDenoiser
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import TextConditioner
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import Heun, slerp

MODEL = Path(__file__).parents[1] / "ldm-small"
ROWS = [
    ("a gem stone, openmoji style", "a potted plant, openmoji style"),
    ("a snake, twemoji style", "a grinning face with big eyes, twemoji style"),
]
SHARES, STEPS = 7, 40


def true_pictures(captions: list[str]) -> torch.Tensor:
    """Those of held-out emoji, ``n 3 h w`` in [-1, 1]."""
    data, found = EmojiData(), []
    for caption in captions:
        index = next(i for i, e in enumerate(data.examples) if caption in e.captions)
        assert data.examples[index].held_out, caption
        picture = Image.new("RGBA", (data.size, data.size), "white")
        picture.alpha_composite(data.load(index))
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        found.append(pixels.reshape(data.size, data.size, 3).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    """Writes the picture beside this file."""
    pipe = LatentDiffusionPipeline.from_pretrained(MODEL)
    codec, config = VaeCodec(pipe.vae), pipe.scheduler.config
    predict = predictor(FamilyDenoiser(pipe.family, pipe.unet), target_of(config))
    sampler = Heun(process_of(config), target_of(config))
    conditioner = TextConditioner(pipe.tokenizer, pipe.text_encoder)
    captions = [caption for row in ROWS for caption in row]
    true, cond = true_pictures(captions), conditioner.encode(captions)
    noise = sampler(predict, codec.encode(true).mean, cond, steps=STEPS, start=0.0, stop=1.0)
    shares, half, tokens = torch.linspace(0, 1, SHARES), len(ROWS), cond.tokens
    between, mixed = [], []
    for row in range(half):
        a, b = 2 * row, 2 * row + 1
        between += [slerp(noise[a : a + 1], noise[b : b + 1], float(w)) for w in shares]
        mixed += [(1 - w) * tokens[a] + w * tokens[b] for w in shares]
    cond = Condition(torch.stack(mixed))
    latents = sampler(predict, torch.cat(between), cond, steps=STEPS, start=1.0, stop=0.0)
    drawn = codec.decode(latents).reshape(half, SHARES, *true.shape[1:])
    rows = [torch.cat([true[2 * r], *drawn[r].unbind(), true[2 * r + 1]], -1) for r in range(half)]
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(
        Path(__file__).with_suffix(".png"), optimize=True
    )


if __name__ == "__main__":
    main()
