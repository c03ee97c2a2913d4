"""What a weight in a prompt does to a picture, read by a checker that has learnt nothing.

    python tests/benchmarks/prompt_weights.py [--scenes 200] [--steps 6] [--out weights.png]

Prompts such as "a large (red:1.5) blue square at the top on a white background", by the model in
assets: a thing can have but one of two colours, and says which of the words was heard. In every
other prompt the word with the weight is the second of the two; scenes and noise are those of
weight 1, so that the differences are of pairs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from ldm.demo.checker import read
from ldm.demo.scene import Scene, captions, contrasting
from ldm.demo.shape_suites import scenes
from ldm.evaluation.distances import bootstrap
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import save, sheet
from ldm.pipeline import LatentDiffusionPipeline

BATCH, SHOWN = 20, 12
WEIGHTS = (1.0, 1.5, 0.5)
FOLDER = Path(__file__).parents[2] / "assets" / "ldm-small"


def rival(scene: Scene, number: int) -> str:
    """Another colour that can be seen on the background of scene ``number``."""
    others = [c for c in contrasting(scene.background) if c != scene.things[0].colour]
    return others[number % len(others)]


def prompt(scene: Scene, number: int, weight: float) -> str:
    """The caption of a scene, its thing of its own colour, which has the weight, and a rival."""
    colour = scene.things[0].colour
    both = [f"({colour}:{weight:g})", rival(scene, number)]
    return captions(scene)[0].replace(colour, " ".join(both[:: 1 if number % 2 else -1]), 1)


def colours(picture: Image.Image) -> set[str]:
    return {thing.colour for thing in read(picture).things}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    many = scenes(6 * options.scenes, held_out=False)
    asked = [scene for scene in many if scene.position][: options.scenes]
    own, rows = {}, []
    for weight in WEIGHTS:
        begun = time.process_time()
        texts = [prompt(scene, number, weight) for number, scene in enumerate(asked)]
        call = dict(num_inference_steps=options.steps, sampler="dpm++", batch_size=BATCH, seed=0)
        drawn = pipe(texts, prompt_syntax="a1111", **call).images
        seen = list(map(colours, drawn))
        own[weight] = [scene.things[0].colour in s for s, scene in zip(seen, asked, strict=True)]
        other = [rival(scene, n) in s for n, (s, scene) in enumerate(zip(seen, asked, strict=True))]
        for name, hits in (("the colour with it", own[weight]), ("its rival", other)):
            print(f"weight {weight:g}, {name} is drawn: {Proportion.of(sum(hits), len(hits))}")
        if weight != 1:
            one, now = (torch.tensor(own[each], dtype=torch.float64) for each in (1.0, weight))
            gain = bootstrap(now - one, lambda x: 100 * x.mean(1))
            told = f"{gain.value:+.1f} points [{gain.low:.1f}, {gain.high:.1f}]"
            print(f"weight {weight:g} in place of 1: {told}, of pairs")
        print(f"weight {weight:g}: {time.process_time() - begun:.0f} s of CPU", flush=True)
        rows.append(drawn[:SHOWN])
    if options.out is not None:
        save(sheet(rows, columns=1), options.out)


if __name__ == "__main__":
    main()
