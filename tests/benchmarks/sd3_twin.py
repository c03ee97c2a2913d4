"""What small MM-DiTs of configs/papers/sd3.yaml have learnt of 64 emoji, with their T5 and without.

    python training/train.py --config configs/papers/sd3.yaml
    python training/train.py --config configs/papers/sd3.yaml run=runs/papers/sd3_logit_normal \
        process.shift=1
    python training/train.py --config configs/papers/sd3.yaml run=runs/papers/sd3_uniform \
        process.shift=1 objective.times=uniform
    python training/train.py --config configs/papers/sd3.yaml run=runs/papers/sd3_joint \
        text_dropout=0.1
    python training/train.py --config configs/quickstart.yaml run=runs/papers/sd3_unet \
        data.limit=64 duration="20k images" score.captions=64
    python tests/benchmarks/sd3_twin.py runs/papers/sd3/final \
        runs/papers/sd3_logit_normal/final runs/papers/sd3_uniform/final \
        runs/papers/sd3_joint/final runs/papers/sd3_unet/final

(and again with seed=1 and another ``run``). Each folder draws the caption of every emoji, from the
seeds ``--seed``, + 1, ...:

    first        share of pictures whose nearest of the 64 is the one that was asked for, by pixels
                 (what ``score`` tells at the end of a run) and by pixels:16 (the space of
                 ``ldm evaluate``)
    first five   the same of the five nearest
    without T5   the same where zeros stand for the tokens of the T5, as stock draws without
                 ``text_encoder_3``, and which share of ``first`` is left
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.images import ImageTransform, to_pixels
from ldm.demo.emoji import EmojiData
from ldm.evaluation.features import space
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.pipeline import LatentDiffusionPipeline

SIDE, EMOJI = 64, 64
SPACES = ("pixels", "pixels:16")
T5, WORDS = "text_encoder_3", "tokenizer_3"


def gallery(count: int) -> tuple[list[str], Tensor]:
    """Captions, and pictures ``n 3 h w``, as the config has them."""
    source = EmojiData(styles=("twemoji",), limit=count, hold_out=False, composed=False)
    seen, numbers = ImageTransform(size=SIDE), range(len(source.examples))
    pictures = torch.stack([to_pixels(seen(source.load(n))) for n in numbers])
    return [example.captions[0] for example in source.examples], pictures


def measured(pipe: Any, texts: list[str], true: Tensor, args: Any, **told: Any) -> float:
    """Tells the shares; returns that of the first by pixels."""
    pipe.set_progress_bar_config(disable=True)
    many = texts * args.each
    truth = torch.arange(len(texts)).repeat(args.each)
    how = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, batch_size=args.batch)
    drawn = pipe(many, seed=args.seed, output_type="pt", **how, **told).images.float() * 2 - 1
    first = list[float]()
    for name in SPACES:
        features = space(name, "cpu")
        found = ranks(features(drawn), features(true), truth)
        hits, five = (Proportion.of(int((found < k).sum()), len(found)) for k in (1, 5))
        print(f"  {name}: first {hits}; first five {five}", flush=True)
        first.append(hits.value)
    return first[0]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=EMOJI, help="emoji that were trained on")
    parser.add_argument("--each", type=int, default=1, help="pictures of each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts, true = gallery(args.count)
    for folder in args.folders:
        pipe = LatentDiffusionPipeline.from_pretrained(folder)
        print(f"{folder}\n all text encoders")
        first = measured(pipe, texts, true, args)
        tower = pipe.conditioner.towers.get(T5)
        if tower is None:
            continue
        print(" without T5")
        alone = LatentDiffusionPipeline.from_pretrained(folder, **{T5: None, WORDS: None})
        left = measured(alone, texts, true, args, max_sequence_length=tower.length)
        print(
            f"  {100 * left / first:.0f} % of the first are left" if first else "  none was first"
        )


if __name__ == "__main__":
    main()
