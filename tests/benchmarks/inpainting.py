"""How well a hole in a picture is filled by a model that was trained for none.

    python tests/benchmarks/inpainting.py [--scenes 64] [--steps 8] [--holes half] [--out fills.png]

Held-out scenes of one thing, a mask over the thing, and the caption: the checker of ``ldm.demo``
reads what was drawn. ``--holes half`` covers one of its four halves alone, which has to fit what is
left of it; ``--holes other`` covers a thing of another colour and shape, so that the caption asks
for something else than what is hidden. A row of the picture is one way: the scene, what is known of
it, replacement at every step (``mask_image``), text alone pasted into the hole, ``LinearInverse``,
stock's pipeline on the same U-Net and sampler, told the picture as it is, and without what is in
the hole, and both of its ``StableDiffusionInpaintPipelineLegacy`` (``--stock legacy``: beside the
first way these two alone), which noises what is known to the level that a step came from, takes
the mask's nearest pixel for a cell, and begins at the noised picture. All others set out from noise
alone. What an encoder makes of
cells beside a hole says something of what is in it: stock that is told the picture as it is knows
of the answer. PSNR in the hole is of pictures with the input outside of it, that of the whole
picture of what each way gives back, which of stock's pipeline is the decoder's outside as well.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_inpaint_legacy import (  # noqa: E501
    StableDiffusionInpaintPipelineLegacy,
)
from PIL import Image, ImageChops

from ldm.demo.checker import compare, read
from ldm.demo.scene import Scene, Shape, captions, contrasting, render
from ldm.demo.shape_suites import scenes
from ldm.diffusion import stream
from ldm.editing.masks import cells, filled
from ldm.evaluation.distances import Figure, mean
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import save, sheet
from ldm.guidance import Chain, ClassifierFree, LinearInverse
from ldm.guidance.operators import inpainting
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import SchedulerSampler, sampler

SIDE, MARGIN, BATCH = 64, 2, 16
FOLDER = Path(__file__).parents[2] / "assets" / "ldm-small"


def hole(picture: Image.Image) -> Image.Image:
    """White over the box of what is not background, and some pixels around it."""
    pixels = np.asarray(picture, float)
    rows, columns = np.where(np.abs(pixels - pixels[0, 0]).sum(-1) > 30)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    box = [slice(max(at.min() - MARGIN, 0), at.max() + MARGIN + 1) for at in (rows, columns)]
    mask[tuple(box)] = 255
    return Image.fromarray(mask)


def half(mask: Image.Image, number: int) -> Image.Image:
    """A half of the box: left, right, upper and lower in turn."""
    pixels = np.array(mask)
    axis = 1 - number % 4 // 2
    at = np.where(pixels.any(1 - axis))[0]
    middle = (at[0] + at[-1] + 1) // 2
    gone = slice(middle, None) if number % 2 == 0 else slice(None, middle)
    pixels[(gone, slice(None)) if axis == 0 else (slice(None), gone)] = 0
    return Image.fromarray(pixels)


def another(scene: Scene, number: int) -> Scene:
    """A thing of another colour and shape in the place of the only one."""
    (thing,) = scene.things
    draw = stream(0, "another thing", number)

    def one(names: tuple[Any, ...], but: Any) -> Any:
        left = [name for name in names if name != but]
        return left[int(draw.integers(len(left)))]

    colour = one(contrasting(scene.background), thing.colour)
    shape = one(get_args(Shape), thing.shape)
    return replace(scene, things=(replace(thing, colour=colour, shape=shape),))


def surroundings(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What ours sees: the nearest that is known in place of what is in the hole."""
    pixels, drawn = (torch.from_numpy(np.array(one)).float() for one in (picture, mask))
    seen = filled(pixels.movedim(2, 0)[None], drawn[None, None])[0].movedim(0, 2)
    return Image.fromarray(seen.byte().numpy())


def psnr(made: Image.Image, true: Image.Image, mask: Image.Image | None = None) -> float:
    """Of the pixels in the hole, or of all, dB."""
    apart = np.asarray(made, float) - np.asarray(true, float)
    if mask is not None:
        apart = apart[np.asarray(mask) > 0]
    return 20 * math.log10(255 / max(float((apart**2).mean() ** 0.5), 0.5))


def told(figure: Figure) -> str:
    return f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def judged(name: str, made: list[Image.Image], asked: list[Scene], seconds: float) -> None:
    verdicts = [compare(read(picture), scene) for picture, scene in zip(made, asked, strict=True)]
    seen = {
        "everything": [verdict.whole for verdict in verdicts],
        "colour and shape": [verdict.binding for verdict in verdicts],
        "count": [verdict.count for verdict in verdicts],
    }
    for what, hits in seen.items():
        print(f"{name}, {what}: {Proportion.of(sum(hits), len(hits))}")
    print(f"{name}: {seconds:.0f} s of CPU", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--holes", choices=("thing", "half", "other"), default="thing")
    parser.add_argument("--sampler", default="dpm++")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of every step of ddim")
    parser.add_argument("--stock", choices=("all", "legacy"), default="all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    many = scenes(6 * options.scenes, held_out=True)
    asked = [scene for scene in many if len(scene.things) == 1][: options.scenes]
    texts = [captions(scene)[0] for scene in asked]
    true = [render(scene, SIDE) for scene in asked]
    masks, given = [hole(picture) for picture in true], true
    if options.holes == "half":
        masks = [half(mask, n) for n, mask in enumerate(masks)]
    elif options.holes == "other":
        given = [render(another(scene, n), SIDE) for n, scene in enumerate(asked)]
        masks = [ImageChops.lighter(*two) for two in zip(masks, map(hole, given), strict=True)]
    gray = Image.new("RGB", (SIDE, SIDE), "gray")
    pairs = list(zip(given, masks, strict=True))
    known = [surroundings(*pair) for pair in pairs]
    rows = [given, [Image.composite(gray, picture, mask) for picture, mask in pairs]]
    call = dict(num_inference_steps=options.steps, sampler=options.sampler, batch_size=BATCH)
    call |= {"eta": options.eta} if options.eta else {}

    def pasted(made: list[Image.Image]) -> list[Image.Image]:
        return [Image.composite(*three) for three in zip(made, given, masks, strict=True)]

    def replaced() -> list[Image.Image]:
        return pipe(texts, image=given, mask_image=masks, seed=0, **call).images

    def text_alone() -> list[Image.Image]:
        return pipe(texts, seed=0, **call).images

    def inverse() -> list[Image.Image]:
        pixels = torch.stack([torch.from_numpy(np.array(one)).movedim(2, 0) for one in given])
        moments = pipe.codec.encode(pixels / 127.5 - 1)
        z = pipe.codec.sample(moments, torch.zeros_like(moments.mean))
        unknown = torch.stack([torch.from_numpy(np.array(one) / 255.0)[None] for one in masks])
        known = 1 - cells(unknown.float(), pipe.codec.factor)
        scale, made = pipe.sampling_defaults.guidance_scale, []
        for n in range(0, len(asked), BATCH):
            part = slice(n, n + BATCH)
            inside = LinearInverse(inpainting(known[part]), known[part] * z[part], iterations=1)
            guidance = Chain((ClassifierFree(scale), inside))
            seeds = list(range(n, n + len(texts[part])))
            made += pipe(texts[part], seed=seeds, guidance=guidance, **call).images
        return made

    def opened(kind: Any) -> Any:
        """A pipeline of stock's, of the same parts."""
        names = "vae", "text_encoder", "tokenizer", "unet"
        own = sampler(options.sampler, pipe.scheduler.config)
        assert isinstance(own, SchedulerSampler)
        theirs = kind(
            **{name: pipe.components[name] for name in names},
            scheduler=own.scheduler.from_config(own.config),
            **dict.fromkeys(("safety_checker", "feature_extractor")),
            requires_safety_checker=False,
        )
        theirs.set_progress_bar_config(disable=True)
        return theirs

    asked_of_stock = dict(
        strength=1.0, num_inference_steps=options.steps, eta=options.eta,
        guidance_scale=pipe.sampling_defaults.guidance_scale,
    )  # fmt: skip

    def stock(pictures: list[Image.Image] = given) -> list[Image.Image]:
        theirs, made = opened(StableDiffusionInpaintPipeline), []
        for n in range(0, len(asked), BATCH):
            part = slice(n, n + BATCH)
            made += theirs(
                texts[part], image=pictures[part], mask_image=masks[part], height=SIDE, width=SIDE,
                generator=[torch.Generator().manual_seed(n + k) for k in range(len(texts[part]))],
                **asked_of_stock,
            ).images  # fmt: skip
        return made

    def stock_blind() -> list[Image.Image]:
        return stock(known)

    def legacy(pictures: list[Image.Image] = given) -> list[Image.Image]:
        """One at a time, as it takes them."""
        theirs, made = opened(StableDiffusionInpaintPipelineLegacy), []
        for n, (text, picture, mask) in enumerate(zip(texts, pictures, masks, strict=True)):
            generator = torch.Generator().manual_seed(n)
            told = dict(image=picture, mask_image=mask, generator=generator, **asked_of_stock)
            made += theirs(text, **told).images
        return made

    def legacy_blind() -> list[Image.Image]:
        return legacy(known)

    ours = torch.zeros(0)
    others = (text_alone, inverse, stock, stock_blind) if options.stock == "all" else ()
    for draw in (replaced, *others, legacy, legacy_blind):
        begun = time.process_time()
        made = draw()
        rows.append(pasted(made))
        judged(draw.__name__, rows[-1], asked, time.process_time() - begun)
        near = torch.tensor(
            [list(map(psnr, rows[-1], true, masks)), list(map(psnr, made, true))],
            dtype=torch.float64,
        )
        for number, where in enumerate(("in the hole", "of the whole picture")):
            print(f"{draw.__name__}, PSNR {where}: {told(mean(near[number]))} dB")
            if len(ours):
                above = told(mean(ours[number] - near[number]))
                print(f"replaced above {draw.__name__} {where}: {above} dB, of pairs")
        ours = ours if len(ours) else near
    if options.out is not None:
        save(sheet([row[:12] for row in rows], columns=1), options.out)


if __name__ == "__main__":
    main()
