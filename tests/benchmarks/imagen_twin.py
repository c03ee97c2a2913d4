"""What the small cascade of configs/papers/imagen_*.yaml draws, and what its parts are worth.

    python training/train.py --config configs/papers/imagen_base.yaml
    python training/train.py --config configs/papers/imagen_sr.yaml
    python training/train.py --config configs/papers/imagen_sr.yaml \
        run=runs/papers/imagen_sr_plain aside.levels=[0,0]
    python tests/benchmarks/imagen_twin.py runs/papers/imagen_base/final \
        runs/papers/imagen_sr/final --plain runs/papers/imagen_sr_plain/final --sheet imagen.png

    cascade      of captions of unseen scenes of one thing, the share of which everything is read
                 right: of the base's pictures enlarged bilinearly, by the super-resolution, and by
                 one that was trained without augmentation; the same of true pictures made as small
    levels       the same, and KID to true pictures, where the super-resolution is told that the
                 base's pictures are noised at some levels of 1,000, and they are
    thresholds   of the base by guidance: share of channels at 0 or 255, KID, CLIP score, and what
                 is read, without a threshold, with a static and with a dynamic one
    sizes        KID, CLIP score and what is read by guidance, of the base and of others (--others)

KID is of 16 x 16 pixels, the CLIP that of assets/ldm-small; intervals are of 95 %.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.images import to_image
from ldm.demo.checker import compare, read
from ldm.demo.scene import Scene, captions, render
from ldm.demo.shape_suites import scenes
from ldm.evaluation.distances import kid, mean
from ldm.evaluation.features import space
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import save, sheet
from ldm.guidance import Threshold
from ldm.models.pictures import pixels_of
from ldm.pipeline import LatentDiffusionPipeline

SMALL, SIDE = 16, 64
FEATURES = space("pixels:16")
SHIPPED = Path(__file__).parents[2] / "assets" / "ldm-small"


def drawn(pipe: Any, scenes: Sequence[Scene], args: Any, **told: Any) -> Tensor:
    """A picture of each scene's caption, ``n 3 h w`` in [0, 1], the n-th from the seed n."""
    asked = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, sampler="ddpm")
    texts = [captions(scene)[0] for scene in scenes]
    how = asked | dict(seed=0, batch_size=args.batch, output_type="pt") | told
    return pipe(texts, **how).images.float().cpu()


def shown(pictures: Tensor) -> list[Image.Image]:
    """``n 3 h w`` in [0, 1] as they are saved."""
    return [to_image(x * 2 - 1) for x in pictures]


def enlarged(pictures: Tensor) -> Tensor:
    """Bilinearly."""
    return interpolate(pictures, SIDE, mode="bilinear", antialias=True).clamp(0, 1)


def made_large(
    pipe: Any, pictures: Tensor, scenes: Sequence[Scene], level: int, args: Any
) -> Tensor:
    """By a super-resolution that is told so much noise."""
    told = dict(noise_level=level, guidance_scale=args.guidance_enlarging)
    return drawn(pipe, scenes, args, image=shown(pictures), **told)


def tell(
    name: str,
    pictures: Tensor,
    scenes: Sequence[Scene],
    true: Tensor | None = None,
    judge: Any = None,
) -> None:
    """The share of which everything is read right, KID, and CLIP score."""
    whole = [compare(read(x), s).whole for x, s in zip(shown(pictures), scenes, strict=True)]
    told = f"  {name}: {Proportion.of(sum(whole), len(whole))}"
    if true is not None:
        told += f", KID {kid(*(FEATURES(x * 2 - 1) for x in (pictures, true)))}"
    if judge is not None:
        texts = [captions(scene)[0] for scene in scenes]
        told += f", CLIP score {mean(judge(texts, pictures * 2 - 1))}"
    print(told, flush=True)


def cascade(
    of_base: Tensor, true: Tensor, enlarging: Any, plain: Any, asked: list[Scene], args: Any
) -> list[Tensor]:
    """See above; the base's pictures as large, and what others made of them."""
    print("cascade")
    small = interpolate(true, SMALL, mode="area")
    rows = [enlarged(of_base)]
    tell("bilinear", rows[0], asked)
    tell("bilinear of the true ones", enlarged(small), asked)
    ways = [("super-resolution", enlarging, args.noise_level)]
    ways += [("super-resolution without augmentation", plain, 0)] if plain else []
    for name, pipe, level in ways:
        for which, pictures in (("", of_base), (" of the true ones", small)):
            found = made_large(pipe, pictures, asked, level, args)
            tell(name + which, found, asked)
            rows += [] if which else [found]
    return [*rows, true]


def levels(
    of_base: Tensor, true: Tensor, enlarging: Any, asked: list[Scene], args: Any
) -> list[Tensor]:
    """See above; the base's pictures as large, and what was made of them by level."""
    print("levels")
    rows = [enlarged(of_base)]
    for level in args.levels:
        found = made_large(enlarging, of_base, asked, level, args)
        tell(str(level), found, asked, true)
        rows.append(found)
    return rows


def thresholds(base: Any, true: Tensor, asked: list[Scene], args: Any) -> list[Tensor]:
    """See above; pictures by threshold at the highest guidance, as large as the others'."""
    print("thresholds")
    own, rows = base.scheduler, []
    judge = space(f"clip:{SHIPPED}").judge
    for kind in ("none", "static", "dynamic"):
        stated = Threshold.stated(kind, own.config)
        base.scheduler = own.from_config({**own.config, **stated})
        for guidance in args.guidances:
            found = drawn(base, asked, args, guidance_scale=guidance)
            levels = (found * 255).round()
            full = ((levels == 0) | (levels == 255)).float().flatten(1).mean(1)
            told = f"{kind}, guidance {guidance:g}, {100 * float(full.mean()):.1f} % at 0 or 255"
            tell(told, enlarged(found), asked, true, judge)
        rows.append(enlarged(found))
    base.scheduler = own
    return rows


def sizes(bases: dict[str, Any], true: Tensor, asked: list[Scene], args: Any) -> None:
    """See above."""
    print("sizes")
    judge = space(f"clip:{SHIPPED}").judge
    for name, base in bases.items():
        counts = [
            sum(p.numel() for p in part.parameters()) for part in (base.unet, base.text_encoder)
        ]
        print(f"  {name}: {counts[0]:,} parameters of the U-Net, {counts[1]:,} of the text encoder")
        for guidance in args.guidances:
            found = drawn(base, asked, args, guidance_scale=guidance)
            tell(f"{name}, guidance {guidance:g}", enlarged(found), asked, true, judge)


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """The true pictures, ``n 3 h w`` in [0, 1]."""
    return pixels_of([render(scene, SIDE) for scene in scenes]) / 2 + 0.5


def opened(folder: Path) -> Any:
    """The pipeline of ``folder``."""
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("enlarging", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--guidance-enlarging", type=float, default=1.0)
    parser.add_argument("--guidances", type=float, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="folders of bases")
    parser.add_argument("--noise-level", type=int, default=100)
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 50, 100, 150, 200, 300])
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--sheet", type=Path, help="pictures: PATH's name, then what they are of")
    args = parser.parse_args()
    asked = scenes(args.count, held_out=False, kinds=("one",))
    base, enlarging = opened(args.base), opened(args.enlarging)
    plain = args.plain and opened(args.plain)
    of_base, true = drawn(base, asked, args), pixels(asked)
    found = {
        "cascade": cascade(of_base, true, enlarging, plain, asked, args),
        "levels": levels(of_base, true, enlarging, asked, args),
        "thresholds": thresholds(base, true, asked, args),
    }
    if args.others:
        sizes({str(f): opened(f) for f in (args.base, *args.others)}, true, asked, args)
    for name, columns in found.items() if args.sheet else ():
        rows = [list(row) for row in zip(*map(shown, columns), strict=True)]
        save(sheet(rows[:16], columns=2), args.sheet.with_stem(f"{args.sheet.stem}-{name}"))


if __name__ == "__main__":
    main()
