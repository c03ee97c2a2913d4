"""A ControlNet trained: it begins as nothing, its hints are seen as the pictures are, and what it
has learnt is a folder of diffusers' own, the same cached or not, interrupted or not.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from diffusers import ControlNetModel
from PIL import Image

from launched import digests, logged, losses
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data import hints
from ldm.data.collection import Collection
from ldm.diffusion import Condition
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.engine.state import OtherRunError
from ldm.errors import ConfigError, DataError
from ldm.families.build import build
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from runs import accelerator, train, tree


def pictures(folder: Path, *, hinted: bool = True) -> dict[str, str]:
    """12 captioned pictures of three shapes, and beside them hints, which are the same."""
    drawn = np.random.default_rng(0)
    for n in range(12):
        width, height = [(32, 16), (16, 32), (24, 24)][n % 3]
        pixels = drawn.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height))
        for place in ("pictures", "hints") if hinted else ("pictures",):
            (folder / place / "a").mkdir(parents=True, exist_ok=True)
            image.save(folder / place / "a" / f"{n}.{'png' if place == 'hints' else 'bmp'}")
        (folder / "pictures" / "a" / f"{n}.txt").write_text(f"picture {n}")
    return {"path": str(folder / "pictures"), "hints": str(folder / "hints")}


def settings(data: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    told = {"train": ["controlnet"], "duration": "3 steps", "batch_size": 4, **changes}
    return told | ({"data": data} if data else {})


def made(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, tree(Path("run"), **settings(**changes)))


def test_a_run_is_the_same_cached_or_not_and_interrupted_or_not(tmp_path, own_cache):
    validation = {"every": "3 steps", "images": 1, "levels": 2, "steps": 1, "captions": 2}
    told = settings(pictures(tmp_path), optimizer={"lr": 1e-2}, validation=validation,
                    images={"size": 16, "flip": True, "buckets": {"step": 8}})  # fmt: skip
    final = train(tmp_path / "whole", **told)
    train(tmp_path / "parts", **told | {"duration": "2 steps"}, cache_latents=False, workers=1)
    train(tmp_path / "parts", **told, cache_latents=False, gradient_checkpointing=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    both = [digests(tmp_path / name / "final", at_least=1) for name in ("parts", "whole")]
    assert both[0] == both[1]
    assert logged(tmp_path / "whole", "held_out_loss")[0] > 0
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 1
    net = ControlNetModel.from_pretrained(final)
    assert bool(net.controlnet_mid_block.weight.any())
    base = tmp_path / "whole" / "base"
    pipe = LatentDiffusionPipeline.from_pretrained(base, controlnet=final)
    pipe.set_progress_bar_config(disable=True)
    hint = Image.open(tmp_path / "hints" / "a" / "2.png")
    asked: dict[str, Any] = dict(num_inference_steps=1, seed=0, output_type="pt")
    drawn = pipe("picture 2", **asked, control_image=hint).images
    off = pipe("picture 2", **asked, control_image=hint, controlnet_conditioning_scale=0).images
    plain = LatentDiffusionPipeline.from_pretrained(base)("picture 2", **asked, height=24, width=24)
    assert drawn.shape == (1, 3, 24, 24) and not torch.equal(drawn, off)
    assert torch.equal(off, plain.images)
    # It learns on from its folder; another set of hints is another run.
    more = told | {"controlnet": {"folder": str(final)}, "duration": "1 steps", "validation": None}
    train(tmp_path / "more", **more)
    hint.rotate(180).save(tmp_path / "hints" / "a" / "2.png")
    with pytest.raises(OtherRunError, match="the pictures or captions"):
        train(tmp_path / "more", **more | {"duration": "2 steps"})


def test_it_begins_as_nothing_and_hints_are_seen_as_the_pictures_are(tmp_path, own_cache):
    """The first step is the base's, bit for bit; a hint that is the picture stays it under random
    crops, shifts and flips.
    """
    images = {"size": 16, "flip": True, "crop": "random", "random_shift": 3}
    config = made(data=pictures(tmp_path), cache_text=False, images=images)
    model = build(config, ["picture 1"])
    collection = Collection(config.data, config.images)
    hints.check([collection.train, collection.held_out])
    parts = model.codec, model.conditioner, accelerator()
    encoder = Encoder(config, *parts, aside=model.aside)
    draws = ImageDraws(config, collection, encoder)
    rows = [draws[n] for n in range(8)]
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    cond = encoder.condition(batch)
    hint = cond.extra["hint:0"]
    assert torch.allclose(hint * 2 - 1, batch["pixels"], atol=1e-6)
    example = encoder.example(8)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in example.items()
    }
    x, t = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    bare = Condition(cond.tokens)
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, t, cond), model.denoiser(x, t, bare))
        model.networks["controlnet"].controlnet_mid_block.bias += 0.1
        assert not torch.equal(model.denoiser(x, t, cond), model.denoiser(x, t, bare))
    dry = text_to_image.step(config)
    assert dry.networks["controlnet"].device.type == "meta" and dry.saved is None


WRONG = {
    "train: a ControlNet learns alone": {"train": ["controlnet", "unet"]},
    "lora: train names a ControlNet": {"lora": {"rank": 2}},
    "controlnet: it does not learn": {"train": ["unet"], "controlnet": {}},
    "channels: those of the folder": {"controlnet": {"folder": "x", "channels": [4, 4]}},
    "controlnet.channels: 3 layers make a hint 4 times smaller": {
        "controlnet": {"channels": [4, 4, 4]}
    },
    "the U-Net of this model has random Fourier features": {"unet": {"time_embedding": "fourier"}},
    "a model of the family pixels can have no ControlNet": {
        "condition": "none", "text": None, "vae": "pixels", "text_dropout": 0
    },
    "validation.prompts: this model is also told": {
        "validation": {"every": "2 steps", "prompts": ["a ring"]}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(made(**WRONG[message]), [], meta=True)
    assert "\n" not in str(caught.value)


def test_hints_that_are_missing_are_named(tmp_path, own_cache):
    def checked(**changes: Any) -> None:
        config = made(data={"path": str(tmp_path / "pictures"), **changes})
        collection = Collection(config.data, config.images)
        hints.check([collection.train])

    pictures(tmp_path)
    for changes, message in (
        ({}, "there are no hints: set data.hints"),
        ({"hints": str(tmp_path / "none")}, "no such folder, check data.hints"),
    ):
        with pytest.raises(DataError, match=message):
            checked(**changes)
    told = {"hints": str(tmp_path / "hints"), "held_out_fraction": 0}
    checked(**told)
    file = tmp_path / "hints" / "a" / "4.png"
    Image.new("RGB", (20, 16)).save(file)
    with pytest.raises(DataError, match=r"4.png has 20 x 16 pixels, and its picture 16 x 32"):
        checked(**told)
    file.unlink()
    with pytest.raises(DataError, match=r"holds no hint that can be read for a/4.bmp"):
        checked(**told)
    for suffix in ("png", "jpg"):
        Image.new("RGB", (16, 32)).save(file.with_suffix(f".{suffix}"))
    with pytest.raises(DataError, match="4.jpg and a/4.png have one name"):
        checked(**told)


def columned(folder: Path, kind: str) -> dict[str, str]:
    """Four pictures whose hints, half as bright, are named in a column."""
    folder.mkdir()
    made = [Image.effect_noise((16, 12), 60 + n).convert("RGB") for n in range(4)]
    both = {"image": made, "conditioning_image": [image.point(lambda x: x // 2) for image in made]}
    told = {"path": str(folder), "hint_column": "conditioning_image"}
    if kind == "folder":
        (folder / "cond").mkdir()
        rows = []
        for n in range(4):
            names = f"{n}.png", f"cond/{3 - n}.png"
            for name, pictures in zip(names, both.values(), strict=True):
                pictures[n].save(folder / name)
            row = {"file_name": names[0], "conditioning_image": names[1], "text": f"picture {n}"}
            rows.append(json.dumps(row))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        return told

    def data(image: Image.Image) -> bytes:
        image.save(file := io.BytesIO(), "png")
        return file.getvalue()

    columns: dict[str, Any] = {name: list(map(data, images)) for name, images in both.items()}
    columns["text"] = [f"picture {n}" for n in range(4)]
    if kind == "parquet":
        pq.write_table(pa.table(columns), folder / "train.parquet")
    else:
        Dataset.from_dict(columns).save_to_disk(folder)
    return told


@pytest.mark.parametrize("kind", ["folder", "parquet", "datasets"])
def test_hints_of_a_column_are_those_of_their_pictures(kind, tmp_path, own_cache):
    told = columned(tmp_path / "data", kind) | {"held_out_fraction": 0}
    config = made(data=told)
    collection = Collection(config.data, config.images)
    assert collection.sources[0].kind == kind and len(collection.train) == 4
    assert not collection.skipped
    hints.check([collection.train])
    for item in collection.train:
        assert np.array_equal(np.asarray(item.hint()), np.asarray(item.load()) // 2)
    lacks = made(data=told | {"hint_column": "nowhere"})
    with pytest.raises(
        DataError, match=r"(in a |hint_)column 'nowhere'(, check data.hint_column|: )"
    ):
        hints.check([Collection(lacks.data, lacks.images).train])
    if kind == "folder":
        table = tmp_path / "data" / "metadata.jsonl"
        swapped = table.read_text().replace("cond/3", "x").replace("cond/0", "cond/3")
        table.write_text(swapped.replace("x.png", "cond/0.png"))
        again = Collection(made(data=told).data, config.images)
        assert again.summary() != collection.summary()
        with pytest.raises(ConfigError, match="set the folder of the hints or the column"):
            made(data=told | {"hints": str(tmp_path)})
