"""Guidance of assets/ldm-small, measured: the tables and the sheets of this folder.

    python assets/gallery/guidance.py classifier --classifier runs/classifier/final
    python assets/gallery/guidance.py clip [--noised runs/clip_noised/final]
    python assets/gallery/guidance.py inverse

README.md beside it says what they found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.data.items import evenly_spaced
from ldm.demo.checker import read
from ldm.demo.emoji import EmojiData
from ldm.demo.shapes import ShapesData
from ldm.evaluation import sheets
from ldm.evaluation.distances import Figure, mean
from ldm.evaluation.features import clip, space
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.similarity import psnr
from ldm.guidance import (
    Chain,
    ClassifierFree,
    ClipPotential,
    Gradient,
    Guidance,
    LabelPotential,
    LinearInverse,
    Operator,
)
from ldm.guidance.operators import colourisation, deblurring, inpainting, super_resolution
from ldm.models.classifier import NoisyClassifier
from ldm.models.codec import VaeCodec
from ldm.pipeline import LatentDiffusionPipeline

GALLERY = Path(__file__).parent
MODEL = GALLERY.parent / "ldm-small"
HEADS = {
    "inpainting": "mean fill",
    "super-resolution": "bicubic",
    "colourisation": "gray",
    "deblurring": "the blurred",
}


def draw(
    pipe: LatentDiffusionPipeline, prompts: list[str], steps: int, guidance: Guidance, **more: Any
) -> Tensor:
    """Pictures ``n 3 h w`` in [-1, 1], picture i from seed i."""
    images = pipe(
        prompts, num_inference_steps=steps, guidance=guidance, seed=0, output_type="pt", **more
    ).images
    return images * 2 - 1


def row(head: str, cells: Sequence[Figure | Proportion]) -> None:
    """Prints a line of a table."""
    told = []
    for cell in cells:
        if isinstance(cell, Proportion):
            told.append("{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * v for v in cell[:3])))
        else:
            told.append(f"{cell.value:.4g} [{cell.low:.4g}, {cell.high:.4g}]")
    print(f"| {head} | {' | '.join(told)} |", flush=True)


def by_label(pipe: LatentDiffusionPipeline, asked: argparse.Namespace) -> None:
    """Colours of things, asked for by gradients of the classifier alone: the prompt is empty."""
    classifier = NoisyClassifier.from_pretrained(asked.classifier).eval()
    names = list(classifier.config.labels)
    labels = torch.arange(asked.count) % len(names)
    towers = space(f"clip:{MODEL}")  # unit vectors: contrast, which guidance raises, weighs little
    print("| scale | colour asked for | distance of two of one label |\n|---|---|---|")
    cells: list[list[Any]] = [[] for _ in names]
    for scale in asked.scales or (0.0, 2.0, 8.0):
        guidance = Gradient(LabelPotential(classifier, labels), scale)
        drawn = draw(pipe, [""] * asked.count, asked.steps, guidance)
        hits = 0
        for x, label in zip(drawn, labels.tolist(), strict=True):
            things = read(to_image(x)).things
            largest = max(things, key=lambda thing: thing.radius, default=None)
            hits += largest is not None and largest.colour == names[label]
        features = towers(drawn)
        apart = [torch.pdist(features[labels == k]).mean() for k in range(len(names))]
        row(f"{scale:g}", [Proportion.of(hits, asked.count), mean(torch.stack(apart))])
        for k, cell in enumerate(cells):
            cell += [to_image(x) for x in drawn[labels == k][:2]]
    page = sheets.sheet(cells, names, columns=2, scale=1)
    sheets.save(page, asked.out / "classifier.png")


def by_clip(pipe: LatentDiffusionPipeline, asked: argparse.Namespace) -> None:
    """The model's own CLIP, shown the decoded x0, or one that knows noise, shown x_t, under and
    above classifier-free guidance.
    """
    towers, codec, judge = clip(str(MODEL)), VaeCodec(pipe.vae), space(f"clip:{MODEL}").judge
    assert judge is not None
    of: Literal["x_t", "x0"] = "x_t" if asked.noised else "x0"
    guides = clip(str(asked.noised)) if asked.noised else towers
    source = EmojiData()
    chosen = evenly_spaced(
        [n for n, e in enumerate(source.examples) if not e.held_out], asked.count
    )
    texts = [source.examples[n].captions[0] for n in chosen]
    potential = ClipPotential(
        guides.image_features
        if asked.noised
        else lambda x0: towers.image_features(codec.decode(x0)),
        lambda cond: guides.model.text_projection(cond.pooled),
        guides.model.logit_scale.exp().item(),
    )
    print("| classifier-free scale | CLIP guidance | CLIP score | gain |\n|---|---|---|---|")
    cells: list[list[Any]] = [[] for _ in texts]
    for free in (1.0, 3.0):
        plain: Tensor | None = None
        for scale in asked.scales or (0.0, 2.0):
            gradient = Gradient(potential, scale, of=of)
            parts = (ClassifierFree(free), gradient) if scale else (ClassifierFree(free),)
            drawn = draw(pipe, texts, asked.steps, Chain(parts))
            fit = judge(texts, drawn)
            plain = fit if plain is None else plain
            row(f"{free:g} | {scale:g}", [mean(fit), mean(fit - plain)])
            for cell, x in zip(cells, drawn, strict=True):
                cell.append(to_image(x))
    page = sheets.sheet(cells[:12], texts, columns=2, scale=1)
    sheets.save(page, asked.out / ("clip-noised.png" if asked.noised else "clip.png"))


def problems(x: Tensor, noise: float) -> dict[str, tuple[Operator, Tensor, Tensor]]:
    """Of each problem the operator, what was measured of ``x``, and the plain answer."""
    cells = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = interpolate(cells.float(), size=x.shape[-2:], mode="nearest")  # half of 8 x 8 squares
    operators = {
        "inpainting": inpainting(mask),
        "super-resolution": super_resolution(4),
        "colourisation": colourisation(),
        "deblurring": deblurring(2.0),
    }
    draws = torch.Generator().manual_seed(0)
    found = {}
    for name, operator in operators.items():
        y = operator(x)
        n = noise * torch.randn(y.shape, generator=draws)
        found[name] = operator, y + (mask * n if name == "inpainting" else n)
    known = found["inpainting"][1]
    fill = known.sum((2, 3), keepdim=True) / mask.sum()
    plain = {
        "inpainting": known + (1 - mask) * fill,
        "super-resolution": interpolate(found["super-resolution"][1], scale_factor=4,
                                        mode="bicubic", align_corners=False),
        "colourisation": found["colourisation"][1].expand_as(x),
        "deblurring": found["deblurring"][1],
    }  # fmt: skip
    return {name: (*found[name], plain[name]) for name in operators}


def inverse(pipe: LatentDiffusionPipeline, asked: argparse.Namespace) -> None:
    """Held-out shapes from what is left of them; the prompt is their caption."""
    codec, source, transform = VaeCodec(pipe.vae), ShapesData(seed=1), ImageTransform(size=64)
    chosen = evenly_spaced([n for n, e in enumerate(source.examples) if e.held_out], asked.count)
    texts = [source.examples[n].captions[0] for n in chosen]
    true = torch.stack([to_pixels(transform(source.load(n))) for n in chosen])
    print("| problem | plain answer | PSNR of it, dB | PSNR guided, dB | gain, dB |")
    print("|---|---|---|---|---|")
    cells: list[list[Any]] = [[to_image(x)] for x in true]
    found = problems(true, asked.noise)
    for name in asked.problems or found:
        operator, y, plain = found[name]
        guidance = LinearInverse(
            lambda z, operator=operator: operator(codec.decode(z)),
            y,
            asked.noise,
            asked.method,
            iterations=asked.iterations,
        )
        drawn = draw(pipe, texts, asked.steps, guidance, sampler="ddim", eta=asked.eta).clamp(-1, 1)
        before, after = psnr(true, plain.clamp(-1, 1)), psnr(true, drawn)
        row(f"{name} | {HEADS[name]}", [mean(before), mean(after), mean(after - before)])
        for cell, a, b in zip(cells, plain, drawn, strict=True):
            cell += [to_image(a), to_image(b)]
    told = "true, then of each problem the plain answer and the guided one"
    page = sheets.sheet(cells, [told, *[""] * (len(cells) - 1)], columns=1, scale=1)
    sheets.save(page, asked.out / f"{'-'.join(['inverse', *(asked.problems or [])])}.png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("classifier", "clip", "inverse"))
    parser.add_argument("--count", type=int, help="pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scales", type=float, nargs="+")
    parser.add_argument("--classifier", default="runs/classifier/final")
    parser.add_argument("--noised", type=Path, help="clip: of configs/clip_noised.yaml")
    parser.add_argument("--noise", type=float, default=0.05, help="of y, pixels being in [-1, 1]")
    methods = ("replacement", "pigdm", "tweedie")
    parser.add_argument("--method", choices=methods, default="replacement")
    parser.add_argument("--iterations", type=int, default=16, help="of conjugate residuals")
    parser.add_argument("--problems", nargs="+", choices=HEADS, help="all by default")
    parser.add_argument("--eta", type=float, default=1.0, help="of DDIM")
    parser.add_argument("--out", type=Path, default=GALLERY)
    asked = parser.parse_args()
    asked.count = asked.count or {"classifier": 40, "clip": 12, "inverse": 6}[asked.what]
    pipe = LatentDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    {"classifier": by_label, "clip": by_clip, "inverse": inverse}[asked.what](pipe, asked)


if __name__ == "__main__":
    main()
