"""What the small unCLIP of configs/papers/unclip_*.yaml draws of embeddings, and where it has them
from.

    python training/train_clip.py --config configs/clip_shapes.yaml
    for part in prior prior_regression decoder; do
      python training/train.py --config configs/papers/unclip_$part.yaml; done
    python tests/benchmarks/unclip_twin.py runs/papers/unclip_decoder/final \
        --prior runs/papers/unclip_prior/final \
        --regression runs/papers/unclip_prior_regression/final --sheet unclip.png

    variations      share of unseen scenes whose variation, drawn of the embedding alone, is nearer
                    to its source than another rendering of the same caption is: by 16 x 16 pixels,
                    by the embedding, and by where its things lie
    interpolation   share of ends that read as the pictures they are of: colours and shapes
    components      what is read of pictures that are drawn of their first principal components
                    alone, of 2,000 others'
    text diffs      share of pictures of one thing whose colour is read as the one that was asked
                    for, and share whose shape is another, at some shares of the way
    priors          of unseen captions: cosine to the embedding of their picture, and what is read
                    of pictures that are drawn of the embedding alone: of the prior's, of the
                    text's own in its place, of the regression's, of the true one
    binding         of unseen captions of two things ("a large red circle left of a small blue
                    square"), the share of which each thing has its colour and shape: of the
                    prior's embedding, of the true one, and by a model that reads the tokens of the
                    text (--reading), as GLIDE and Imagen do; of a decoder of such scenes

Intervals are of 95 %.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, normalize

from ldm.data.images import to_image
from ldm.demo.checker import Verdict, compare, read
from ldm.demo.scene import POSITION_JITTER, Scene, captions, contrasting, is_held_out, render
from ldm.demo.shape_suites import scenes
from ldm.demo.shapes import Kind, ShapesData
from ldm.diffusion import stream
from ldm.editing.embeddings import interpolated, principal, text_diff
from ldm.evaluation.distances import mean
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.sheets import save, sheet
from ldm.models.pictures import pixels_of
from ldm.pipeline import LatentDiffusionPipeline

SIDE = 64
SHARES = (0.15, 0.25, 0.35, 0.5)
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)


def again(scene: Scene, number: int) -> Scene:
    """Another rendering of its caption: every thing lies elsewhere by the jitter of the data."""
    draw = stream(0, "another rendering", number)

    def moved(place: float) -> float:
        return round(place + float(draw.uniform(-POSITION_JITTER, POSITION_JITTER)), 4)

    return replace(
        scene, things=tuple(replace(t, x=moved(t.x), y=moved(t.y)) for t in scene.things)
    )


def drawn(pipe: Any, embeds: Tensor, args: Any, prompts: Sequence[str] = ()) -> list[Image.Image]:
    """A picture of each embedding, the n-th from the seed n."""
    asked = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, sampler="ddim")
    texts = list(prompts) or [""] * len(embeds)
    told = dict(image_embeds=embeds, noise_level=args.noise_level, seed=0, batch_size=args.batch)
    images = pipe(texts, output_type="pt", **asked, **told).images.float().cpu()
    return [to_image(x * 2 - 1) for x in images]


def small(pictures: Sequence[Image.Image]) -> Tensor:
    """Pixels of 16 x 16, ``n 768``."""
    return adaptive_avg_pool2d(pixels_of(list(pictures)), 16).flatten(1)


def apart(scene: Scene, picture: Image.Image) -> float:
    """How far the things that are read lie from those of ``scene``, in pixels, the mean; none are
    as far as the picture is wide.
    """
    seen, total = list(read(picture).things), 0.0
    for thing in scene.things:
        ways = [((t.x - thing.x) ** 2 + (t.y - thing.y) ** 2) ** 0.5 for t in seen]
        if ways:
            del seen[ways.index(min(ways))]
        total += SIDE * min(ways, default=1.0)
    return total / len(scene.things)


def verdicts(pictures: Sequence[Image.Image], asked: Sequence[Scene]) -> list[Verdict]:
    """What of ``asked`` is read in ``pictures``."""
    return [compare(read(x), scene) for x, scene in zip(pictures, asked, strict=True)]


def tell(name: str, hits: Sequence[bool] | Tensor) -> None:
    """A share with its interval."""
    found = [bool(hit) for hit in hits]
    print(f"  {name}: {Proportion.of(sum(found), len(found))}", flush=True)


def variations(pipe: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows of source, another rendering, variation."""
    print("variations")
    asked = scenes(args.count, held_out=False, kinds=args.kinds)
    source = [render(scene, SIDE) for scene in asked]
    other = [render(again(scene, n), SIDE) for n, scene in enumerate(asked)]
    embeds = pipe.embed(source)
    varied = drawn(pipe, embeds, args)
    pixels = [(small(x) - small(source)).square().mean(1) for x in (varied, other)]
    tell("nearer by 16 x 16 pixels", pixels[0] < pixels[1])
    turned = [cosine_similarity(pipe.embed(x), embeds) for x in (varied, other)]
    tell("nearer by the embedding", turned[0] > turned[1])
    places = [
        [apart(scene, x) for scene, x in zip(asked, pictures, strict=True)]
        for pictures in (varied, other)
    ]
    tell("nearer by where things lie", [a < b for a, b in zip(*places, strict=True)])
    tell("everything read right", [v.whole for v in verdicts(varied, asked)])
    return [list(row) for row in zip(source, other, varied, strict=True)]


def interpolation(pipe: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows from one end to the other."""
    print("interpolation")
    asked = scenes(2 * args.pairs, held_out=False, kinds=("one",))
    first, second = asked[::2], asked[1::2]
    a, b = (pipe.embed([render(s, SIDE) for s in part]) for part in (first, second))
    rows = [drawn(pipe, interpolated(a, b, share), args) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ends = [*verdicts(rows[0], first), *verdicts(rows[-1], second)]
    tell("ends read as their ends, colour and shape", [v.binding for v in ends])
    tell("and everything else", [v.whole for v in ends])
    return [list(row) for row in zip(*rows, strict=True)]


def components(pipe: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows of source and what is drawn of ever more components."""
    print("components")
    asked = scenes(args.pairs, held_out=False, kinds=("one",))
    others = ShapesData(count=2000, seed=2, size=SIDE, scenes=tuple(args.kinds))
    source = [render(scene, SIDE) for scene in asked]
    many = [others.load(n) for n in range(others.count)]
    embeds, among = pipe.embed(source), torch.cat([pipe.embed(many[n::8]) for n in range(8)])
    rows = [source]
    for count in COMPONENTS:
        pictures = drawn(pipe, principal(embeds, among, count), args)
        found = verdicts(pictures, asked)
        tell(f"of {count}, the colour", [v.colours == 1 for v in found])
        tell(f"of {count}, the shape", [v.shapes == 1 for v in found])
        rows.append(pictures)
    return [list(row) for row in zip(*rows, strict=True)]


def diffs(pipe: Any, prior: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows of source and what it was turned to."""
    print("text diffs")
    asked = scenes(args.diffs, held_out=False, kinds=("one",))
    others = []
    for number, scene in enumerate(asked):
        (thing,) = scene.things
        colours = [
            colour
            for colour in contrasting(scene.background)
            if colour != thing.colour and not is_held_out(colour, thing.shape)
        ]
        colour = colours[int(stream(0, "another colour", number).integers(len(colours)))]
        others.append(replace(scene, things=(replace(thing, colour=colour),)))
    source = [render(scene, SIDE) for scene in asked]
    embeds = pipe.embed(source)
    before, after = (prior.embed_text([captions(s)[0] for s in part]) for part in (asked, others))
    rows = [source]
    for share in SHARES:
        pictures = drawn(pipe, text_diff(embeds, before, after, share), args)
        found = verdicts(pictures, others)
        tell(f"{share:g} of the way, the asked colour", [v.colours == 1 for v in found])
        tell(f"{share:g} of the way, another shape", [v.shapes == 0 for v in found])
        rows.append(pictures)
    return [list(row) for row in zip(*rows, strict=True)]


def priors(pipe: Any, prior: Any, regression: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows of true, prior's, text's and regression's."""
    print("priors")
    asked = scenes(args.count, held_out=False, kinds=args.kinds)
    texts = [captions(scene)[0] for scene in asked]
    true = pipe.embed([render(scene, SIDE) for scene in asked])
    how = dict(seed=0, batch_size=args.batch)
    found = {"the prior": prior(texts, **how).images}
    # As long as embeddings of pictures are.
    found["the text's own"] = normalize(prior.embed_text(texts)) * true.norm(dim=1).mean()
    if regression is not None:
        found["the regression"] = regression(texts, **how).images
    found["the true one"] = true
    rows = []
    for name, embeds in found.items():
        pictures = drawn(pipe, embeds, args)
        read_as = verdicts(pictures, asked)
        print(f"  {name}: cosine {mean(cosine_similarity(embeds, true))}")
        tell(f"{name}, colours and shapes", [v.binding for v in read_as])
        tell(f"{name}, everything", [v.whole for v in read_as])
        rows.append(pictures)
    pictures = drawn(pipe, found["the prior"], args, texts)
    tell("the prior beside its text, everything", [v.whole for v in verdicts(pictures, asked)])
    return [list(row) for row in zip(*rows, pictures, strict=True)]


def binding(pipe: Any, prior: Any, reading: Any, args: Any) -> list[list[Image.Image]]:
    """See above; rows of true, of the prior, of the true embedding, and by tokens."""
    print("binding")
    asked = scenes(args.count, held_out=False, kinds=("two",))
    texts = [captions(scene)[0] for scene in asked]
    source = [render(scene, SIDE) for scene in asked]
    found = {
        "the prior": drawn(pipe, prior(texts, seed=0, batch_size=args.batch).images, args),
        "the true embedding": drawn(pipe, pipe.embed(source), args),
    }
    scale = reading.sampling_defaults.guidance_scale
    how = dict(num_inference_steps=args.steps, guidance_scale=scale, sampler="ddim")
    found["by tokens"] = reading(texts, seed=0, batch_size=args.batch, **how).images
    for name, pictures in found.items():
        read_as = verdicts(pictures, asked)
        tell(f"{name}, colours", [v.colours == v.things for v in read_as])
        tell(f"{name}, shapes", [v.shapes == v.things for v in read_as])
        tell(f"{name}, each thing its own", [v.binding for v in read_as])
    return [list(row) for row in zip(source, *found.values(), strict=True)]


def opened(folder: Path, device: str) -> Any:
    """The pipeline of ``folder``."""
    pipe = LatentDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--prior", type=Path)
    parser.add_argument("--regression", type=Path)
    parser.add_argument("--reading", type=Path, help="a model that reads tokens")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=["one"])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--diffs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--noise-level", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="pictures: PATH's name, then what they are of")
    args = parser.parse_args()
    if (args.regression or args.reading) and not args.prior:
        parser.error("--regression and --reading go with --prior")
    pipe = opened(args.decoder, args.device)
    found = {"variations": variations(pipe, args), "interpolation": interpolation(pipe, args)}
    found["components"] = components(pipe, args)
    if args.prior:
        prior = opened(args.prior, args.device)
        regression = args.regression and opened(args.regression, args.device)
        found["diffs"] = diffs(pipe, prior, args)
        found["priors"] = priors(pipe, prior, regression, args)
        if args.reading:
            reading = opened(args.reading, args.device)
            found["binding"] = binding(pipe, prior, reading, args)
    for name, rows in found.items() if args.sheet else ():
        save(sheet(rows[:16], columns=2), args.sheet.with_stem(f"{args.sheet.stem}-{name}"))


if __name__ == "__main__":
    main()
