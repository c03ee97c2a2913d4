"""What the small SDXL of configs/papers/sdxl.yaml has learnt of sizes and crops, and its refiner.

    python training/train.py --config configs/papers/sdxl.yaml
    python tests/benchmarks/sdxl_twin.py runs/papers/sdxl/final \
        --without runs/papers/sdxl_without/final --refiner runs/papers/sdxl_refiner/final

    crop        how far the thing in the middle of a wide picture moves when the crop that is asked
                for goes 32 columns to the right: -32 were it cut out of one picture
    softness    gradient energy of pictures whose original is said to be 16 px high, over those of
                64; of true pictures beside it
    checker     share of scenes of which everything is read right, and of attributes; the same of
                the model that was told no sizes
    refiner     its error at t < 0.2 less that of the base, by picture, on unseen scenes
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.demo.checker import compare, read
from ldm.demo.scene import Scene, captions
from ldm.demo.shapes import ShapesData
from ldm.diffusion import Condition, Objective
from ldm.evaluation.distances import mean
from ldm.evaluation.heldout import errors_by_level
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import save, sheet
from ldm.families import FamilyDenoiser
from ldm.families.noise import saved
from ldm.pipeline import LatentDiffusionPipeline

SIDE, WIDE, CROP, SMALL = 64, 96, 32, 16
LEVELS, REFINED = 25, 5  # cells of t, and how many lie below 0.2
SCENES, UNSEEN = 12, 1  # how many are trained on; the seed of others


def scenes(count: int, *, centred: bool = False) -> list[Scene]:
    """The scenes that are trained on, each again and again until there are ``count``.

    Args:
        count: how many.
        centred: those alone whose thing is in the middle column.
    """
    source = ShapesData(count=SCENES, scenes=("one",), hold_out=False)
    every = [source.spec(index) for index in range(source.count)]
    middle = ("at the top", "in the centre", "at the bottom")
    kept = [scene for scene in every if not centred or scene.position in middle]
    return list(itertools.islice(itertools.cycle(kept), count))


def drawn(pipe: LatentDiffusionPipeline, asked: list[Scene], args: Any, **told: Any) -> Tensor:
    """Pictures ``n 3 h w`` in [-1, 1], the n-th from the seed n."""
    texts = [captions(scene)[0] for scene in asked]
    how = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, sampler="ddim")
    images = pipe(texts, seed=0, batch_size=args.batch, output_type="pt", **how, **told).images
    return images.float() * 2 - 1


def middles(pictures: Tensor) -> list[tuple[float, float] | None]:
    """Where the only thing of each picture lies, in pixels; None: there is none, or several."""
    seen = [read(to_image(x)).things for x in pictures]
    return [(t[0].x * SIDE, t[0].y * SIDE) if len(t) == 1 else None for t in seen]


def energy(pictures: Tensor) -> Tensor:
    """Mean square of differences of neighbouring pixels, ``n``."""
    return sum(pictures.diff(dim=axis).square().flatten(1).mean(1) for axis in (2, 3))  # type: ignore[return-value]


def ratio(soft: Tensor, sharp: Tensor) -> str:
    """Of the sums, with its interval."""
    value = float(soft.sum() / sharp.sum())
    residual = (soft - value * sharp) / sharp.mean()
    half = 1.96 * float(residual.std()) / len(soft) ** 0.5
    return f"{value:.3f} ({value - half:.3f} to {value + half:.3f}, n = {len(soft)})"


def checked(pipe: LatentDiffusionPipeline, asked: list[Scene], args: Any, **told: Any) -> Tensor:
    """Tells the share that is read right; returns the pictures."""
    pictures = drawn(pipe, asked, args, **told)
    verdicts = [compare(read(to_image(x)), s) for x, s in zip(pictures, asked, strict=True)]
    right = sum(v.colours + v.shapes + v.sizes for v in verdicts)
    whole = Proportion.of(sum(v.whole for v in verdicts), len(verdicts))
    print(f"  everything right {whole}; of attributes {100 * right / (3 * len(verdicts)):.1f} %")
    return pictures


def errors(folder: Path, pictures: Tensor, asked: list[Scene]) -> Tensor:
    """Squared error of each picture, the mean over the levels below 0.2, ``n``."""
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    process, target, learned = saved(str(folder))
    objective = Objective(target, learned_variance=learned)
    denoiser = FamilyDenoiser(pipe.family, pipe.network)
    numbers = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(asked))
    with torch.no_grad():
        z = pipe.codec.encode(pictures).mean
        cond = pipe.conditioner.encode([captions(scene)[0] for scene in asked])
        cond = Condition(cond.tokens, cond.mask, cond.pooled, {"coordinates": numbers})
        levels = errors_by_level(
            objective, process, denoiser, z, cond,
            levels=LEVELS, seed=0, name="held-out", numbers=range(len(z)),
        )  # fmt: skip
        return torch.stack(list(itertools.islice(levels, REFINED)), 1).mean(1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--without", type=Path, help="trained on the same and told no sizes")
    parser.add_argument("--refiner", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sheet", type=Path, help="pictures, asked for in all ways")
    args = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    plain = dict(original_size=(SIDE, SIDE))

    print("crop")
    asked = scenes(args.count // 2, centred=True)
    wide: dict[str, Any] = dict(original_size=(SIDE, WIDE), target_size=(SIDE, SIDE))
    both = [drawn(pipe, asked, args, crops_coords_top_left=(0, x), **wide) for x in (0, CROP)]
    found = list(zip(*map(middles, both), strict=True))
    moved = torch.tensor([(b[0] - a[0], b[1] - a[1]) for a, b in found if a and b])
    print(f"  one thing in both {len(moved)} of {len(found)}")
    for name, column in zip(("to the right", "down"), moved.T, strict=True):
        print(f"  {name}: {mean(column)} px, median {float(column.median()):.1f}")

    print("softness")
    asked = scenes(args.count)
    soft = drawn(pipe, asked, args, original_size=(SMALL, SMALL), target_size=(SIDE, SIDE))
    print("checker, told sizes")
    sharp = checked(pipe, asked, args, **plain)
    print(f"  softness {ratio(energy(soft), energy(sharp))}")
    to_side = ImageTransform(size=SIDE)
    true = {
        size: torch.stack(
            [to_pixels(to_side(ShapesData(size=size, scenes=("one",)).load(n)))
             for n in range(SCENES)]
        )
        for size in (SMALL, SIDE)
    }  # fmt: skip
    print(f"  of true pictures {ratio(energy(true[SMALL]), energy(true[SIDE]))}")
    if args.sheet:
        rows = [[to_image(x[n]) for x in (*both, soft, sharp)] for n in range(16)]
        save(sheet(rows, columns=4), args.sheet)
    if args.without:
        print("checker, told none")
        other = LatentDiffusionPipeline.from_pretrained(args.without)
        other.set_progress_bar_config(disable=True)
        checked(other, asked, args)
    if args.refiner:
        source = ShapesData(count=args.count, seed=UNSEEN, scenes=("one",))
        of = [source.spec(n) for n in range(source.count)]
        pictures = torch.stack([to_pixels(to_side(source.load(n))) for n in range(source.count)])
        base, refined = (errors(folder, pictures, of) for folder in (args.base, args.refiner))
        print(f"refiner at t < 0.2\n  base {mean(base)}, refiner {mean(refined)}")
        print(f"  by picture {mean(refined - base)}")


if __name__ == "__main__":
    main()
