"""Draws ``langevin.png``: Langevin dynamics at one level, and annealed, on two separated modes.

    python assets/gallery/langevin.py

The toy of Song & Ermon 2019, figure 3: weights 1/5 and 4/5, samples that begin evenly in a square.
tests/laws/test_langevin.py asserts the shares that the picture shows.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldm.diffusion import Condition, Level, Prediction, VarianceExploding
from ldm.diffusion.streams import stream
from ldm.sampling import Langevin

COUNT, SIDE, REACH = 1280, 240, 9.0
MODES, WEIGHTS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), torch.tensor([0.2, 0.8])
BLUE, INK, GREY = (32, 96, 176), (40, 40, 40), (222, 222, 222)


def score(x: torch.Tensor, level: Level, timestep: torch.Tensor, cond: Condition) -> Prediction:
    """That of two unit Gaussians, noised."""
    variance = 1 + float(level.sigma) ** 2
    off = MODES - x[:, None]
    share = (WEIGHTS.log() - off.square().sum(-1) / (2 * variance)).softmax(1)
    return Prediction(x, level, (share[..., None] * off).sum(1) / variance, "score")


def panel(x: torch.Tensor, title: str) -> Image.Image:
    """Points in the square, and the share of each mode."""
    image = Image.new("RGB", (SIDE, SIDE + 38), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 38, SIDE - 1, SIDE + 37), outline=GREY)
    for a, b in ((x / REACH + 1) * SIDE / 2).tolist():
        a, b = a, SIDE + 38 - b
        draw.ellipse((a - 1, b - 1, a + 1, b + 1), fill=BLUE)
    lower = float((x.sum(1) < 0).float().mean())
    draw.text((4, 4), title, fill=INK)
    draw.text((4, 19), f"{lower:.0%} below, {1 - lower:.0%} above", fill=INK)
    return image


def main() -> None:
    """Writes the picture beside this file."""
    process, cond = VarianceExploding(0.3, 20), Condition(torch.zeros(COUNT, 1, 1))
    square = torch.from_numpy(stream(0, "square").uniform(-8, 8, (COUNT, 2))).float()
    normal = torch.from_numpy(stream(0, "normal").standard_normal((2 * COUNT, 2))).float()
    picked = torch.from_numpy(stream(0, "mode").random(COUNT) < float(WEIGHTS[0]))
    data = torch.where(picked[:, None], MODES[0], MODES[1]) + normal[:COUNT]
    draw = torch.Generator().manual_seed(0)
    one = math.log(1 / 0.3) / math.log(20 / 0.3)  # where sigma is 1
    naive = Langevin(process, "score", corrections=600, r=0.22)(
        score, square, cond, steps=1, start=one, stop=one, generators=draw
    )
    annealed = Langevin(process, "score", corrections=30, r=0.22)(
        score, normal[COUNT:], cond, steps=20, generators=draw
    )
    panels = [
        panel(data, "data"),
        panel(square, "where one level begins"),
        panel(naive, "one level, sigma 1, 600 steps"),
        panel(annealed, "annealed, 20 levels x 30 steps"),
    ]
    sheet = np.concatenate([np.asarray(image) for image in panels], 1)
    Image.fromarray(sheet).quantize(32).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
