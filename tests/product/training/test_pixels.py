"""Models without an autoencoder and without text: they train, go on, save as stock and draw."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from launched import digests
from ldm.cli import app
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.guidance import Threshold
from ldm.models.codec import IdentityCodec, codec_of
from ldm.models.labels import LabelConditioner
from ldm.pipeline import LatentDiffusionPipeline
from runs import train, tree

pytestmark = pytest.mark.usefixtures("own_cache")

COLOURS = ("red", "green", "blue")
PIXELS = {"vae": "pixels", "condition": "none", "text": None}
CLASSES = PIXELS | {"condition": {"classes": list(COLOURS)}}


@pytest.fixture
def coloured(tmp_path) -> dict:
    """Data of 18 pictures of three colours, whose captions say which."""
    folder = tmp_path / "coloured"
    folder.mkdir()
    for n in range(18):
        colour = [0, 0, 0]
        colour[n % 3] = 150 + 5 * n
        Image.new("RGB", (16, 16), tuple(colour)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"A {COLOURS[n % 3].title()} square, {n}")
    return {"path": str(folder)}


def opened(folder: Path, cls=LatentDiffusionPipeline):
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_identity_codec_changes_nothing():
    codec, x = codec_of(None), torch.randn(2, 3, 4, 4)
    moments = codec.encode(x)
    assert isinstance(codec, IdentityCodec) and (codec.factor, codec.channels) == (1, 3)
    assert bool((moments.logvar.exp() == 0).all())
    assert torch.equal(codec.decode(codec.sample(moments, torch.randn_like(x))), x)


def test_labels_are_what_captions_say():
    labels = LabelConditioner(["apple", "red apple", "Pear"])
    cond = labels.encode(["an apple", "a Red Apple", "pear, twice a pear", ""])
    assert cond.extra["label"].tolist() == [0, 1, 2, 3] and cond.tokens is None and len(cond) == 4
    for caption, reason in (("pineapple", "none of"), ("an apple and a pear", "both apple and pe")):
        with pytest.raises(ValueError, match=f"'{caption}' says {reason}"):
            labels.encode([caption])
    with pytest.raises(ValueError, match="some are alike"):
        LabelConditioner(["One", "one"])
    assert LabelConditioner().encode(["anything", ""]).extra["label"].tolist() == [0, 0]


def test_conditions_without_tokens_are_joined_and_chosen_from():
    labels = LabelConditioner(COLOURS)
    both = Condition.cat([labels.encode(["red"]), labels.encode(["blue"])])
    assert both.extra["label"].tolist() == [0, 2]
    kept = both.where(torch.tensor([True, False]), labels.encode(["", ""]))
    assert kept.extra["label"].tolist() == [0, 3]
    with pytest.raises(ValueError, match="'tokens'"):
        Condition.cat([both, Condition(torch.zeros(2, 2, 3), extra=both.extra)])


def test_an_unconditional_folder_is_that_of_stock(tmp_path):
    final = train(tmp_path / "run", duration="2 steps", **PIXELS)
    index = json.loads((final / "model_index.json").read_text())
    assert index.pop("_diffusers_version") and index == {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    ours, stock = opened(final), opened(final, DDIMPipeline)
    call = dict(num_inference_steps=4, output_type="np")
    mine = ours(num_images_per_prompt=2, generator=seeded(), **call).images
    assert (mine == stock(batch_size=2, generator=seeded(), **call).images).all()
    # The folder's own scheduler clips x0 to the range of a pixel, in DDPM as well.
    variance = {"learned_variance": True, "bins": 256}
    learned = train(tmp_path / "v", duration="2 steps", objective=variance, **PIXELS)
    ours, stock = opened(learned), opened(learned, DDPMPipeline)
    assert stock.scheduler.config.clip_sample and ours.unet.config.out_channels == 6
    mine = ours(generator=seeded(), **call).images
    assert (mine == stock(generator=seeded(), **call).images).all()
    with pytest.raises(ValueError, match="this model is unconditional: it reads no prompt"):
        ours("a red square")
    # Guidance would cost twice as much and change nothing.
    calls = []
    ours.unet.register_forward_hook(lambda *_: calls.append(1))
    ours(num_inference_steps=3, sampler="ddim", guidance_scale=5.0)
    assert len(calls) == 3


def test_x0_is_kept_where_pixels_are(tmp_path):
    """By every named sampler, whatever a poor network says; unless the folder says no."""
    pipe = opened(train(tmp_path / "run", duration="2 steps", **PIXELS))
    call = dict(num_inference_steps=5, output_type="latent", seed=0)
    names = ("ddim", "ddpm", "ode-heun", "ancestral", "sde")
    for name in names:
        assert float(pipe(sampler=name, **call).images.abs().max()) <= 1 + 1e-5
    half = pipe(sampler="ddim", guidance=Threshold(0.5), **call).images
    assert float(half.abs().max()) == pytest.approx(0.5, abs=1e-5)
    pipe.scheduler.register_to_config(clip_sample_range=0.25)
    assert float(pipe(sampler="ddim", **call).images.abs().max()) <= 0.25 + 1e-5
    pipe.scheduler.register_to_config(clip_sample=False)
    assert all(float(pipe(sampler=name, **call).images.abs().max()) > 1.2 for name in names)


@pytest.mark.slow  # 60 steps, until colours can be told
def test_a_model_of_classes(tmp_path, coloured):
    settings = CLASSES | {"data": coloured, "text_dropout": 0.3, "objective": {"target": "x0"}}
    validation = {"every": "60 steps", "images": 4, "levels": 2, "prompts": list(COLOURS)}
    validation["steps"] = 4
    settings |= {"optimizer": {"lr": 4e-3}, "batch_size": 8, "ema": None}
    settings["unet"] = {
        "block_out_channels": [16, 32], "scale_shift": True, "attention": [False, False]
    }  # fmt: skip
    final = train(
        tmp_path / "run", duration="60 steps", validation={**validation, "count": 2}, **settings
    )
    pipe = opened(final)
    assert pipe.config.classes == list(COLOURS) and pipe.unet.config.num_class_embeds == 4
    # What it draws is of the colour that was asked for.
    call = dict(num_inference_steps=5, output_type="pt", seed=0, sampler="ddim")
    drawn = pipe([*COLOURS], guidance_scale=2.0, num_images_per_prompt=2, **call).images
    assert drawn.mean((2, 3)).argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    guided, plain = (pipe("blue", guidance_scale=s, **call).images for s in (3.0, 1.0))
    assert not torch.equal(guided, plain)
    with pytest.raises(ValueError, match="'dog' says none of the classes red, green, blue"):
        pipe("dog")
    # Six pictures of 32 pixels in a row.
    (page,) = (tmp_path / "run" / "samples").iterdir()
    assert Image.open(page).width == 8 * (2 * 16 + 8)
    # A run that starts from the folder knows what it reads.
    tuned = tree(tmp_path / "tuned", model=str(final), data=coloured)
    for part in ("vae", "text", "unet"):
        del tuned[part]
    model = build(validate(TrainConfig, tuned), [])
    assert (
        model.classes == COLOURS
        and "vae" not in model.networks
        and isinstance(model.networks["unet"], UNet2DModel)
    )
    assert set(model.origin) == {"model.unet", "model.scheduler", "model.classes"}
    with pytest.raises(ConfigError, match="has 4 labels, condition makes 3"):
        build(validate(TrainConfig, {**tuned, "condition": {"classes": ["red", "blue"]}}), [])
    wrong = {**tuned, "validation": {**validation, "prompts": ["red", "dog"]}}
    with pytest.raises(ConfigError, match=r"validation\.prompts: 'dog' says none of the classes"):
        build(validate(TrainConfig, wrong), [])
    # Stock has no pipeline that hands labels on.
    index = json.loads((final / "model_index.json").read_text())
    assert index["_class_name"] == "LatentDiffusionPipeline"


def test_an_unconditional_run_reads_no_prompt(tmp_path, coloured):
    plain = tree(tmp_path / "run", **(CLASSES | {"condition": "none", "data": coloured}))
    for part in ("text",):
        plain.pop(part, None)
    plain["validation"] = {"every": "1 steps", "images": 2, "prompts": ["a dog"]}
    with pytest.raises(ConfigError, match=r"validation\.prompts: this model is unconditional"):
        build(validate(TrainConfig, plain), [])


@pytest.mark.parametrize("meta", [True, False])
def test_a_model_of_text_cannot_be_told_nothing(tmp_path, coloured, meta):
    folder = tiny.folder(tmp_path / "tiny")
    plain = {"run": str(tmp_path / "run"), "model": str(folder), "condition": "none"}
    plain |= {"data": coloured, "duration": "1 step", "images": {"size": 32}}
    with pytest.raises(ConfigError, match=r"condition: the U-Net of .* reads text"):
        build(validate(TrainConfig, plain), [], meta=meta)


def test_going_on_is_exact_and_the_average_is_in_front(tmp_path, coloured):
    settings = CLASSES | {"data": coloured, "checkpoints": {"every": "2 steps", "keep": 9}}
    train(tmp_path / "whole", duration="4 steps", **settings)
    train(tmp_path / "left", duration="2 steps", **settings)
    train(tmp_path / "left", duration="4 steps", **settings)
    last = "checkpoints/images-000000000064"
    whole, left = (digests(tmp_path / n / last, at_least=3) for n in ("whole", "left"))
    assert whole == left
    front = opened(tmp_path / "left" / last).unet.state_dict()
    raw = load_file(tmp_path / "left" / last / "training" / "raw.safetensors")
    assert raw.keys() == {f"unet.{name}" for name in front}
    assert any(not torch.equal(raw[f"unet.{name}"], value) for name, value in front.items())


def test_captions_without_a_class_are_named_before_anything_is_trained(command, tmp_path, coloured):
    wrong = tree(tmp_path / "run", **CLASSES | {"data": coloured})
    (Path(coloured["path"]) / "4.txt").write_text("a square")
    status, output = command(wrong)
    assert status == 2 and "error: condition: the caption 'a square' says none of" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_latents_without_text_and_pixels_with_text(tmp_path):
    final = train(tmp_path / "latents", duration="2 steps", condition="none", text=None)
    assert opened(final)(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    final = train(tmp_path / "pixels", duration="2 steps", vae="pixels")
    drawn = opened(final)("a red circle", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3) and not (final / "vae").exists()


def test_a_score_network_is_told_sigma(tmp_path):
    settings = PIXELS | {"process": {"kind": "ve", "sigma_min": 0.02, "sigma_max": 30}}
    settings["objective"] = {"target": "score", "weighting": "sigma2"}
    settings["unet"] = {"time_embedding": "fourier", "fourier_scale": 4.0}
    model = build(validate(TrainConfig, tree(tmp_path / "run", **settings)), [])
    told = []
    model.networks["unet"].time_proj.register_forward_pre_hook(lambda _, x: told.append(x[0]))
    t = torch.tensor([0.0, 0.5, 1.0])
    sigma = model.process.level(t).sigma
    x = torch.randn(3, 3, 16, 16)
    label = Condition(extra={"label": torch.zeros(3, dtype=torch.int64)})
    with torch.no_grad():
        score = model.denoiser(x, model.process.timestep(t), label)
    assert torch.allclose(told[0].double(), sigma, rtol=1e-5)
    # What the network computes is divided by sigma: of one size at all levels.
    size = (score.flatten(1).std(1) * sigma).tolist()
    assert max(size) / min(size) < 3
    turns = model.networks["unet"].time_proj.weight.std() * float((sigma[-1] / sigma[0]).log())
    assert float(turns) == pytest.approx(4.0, rel=0.4)


REFUSED = {
    "text: a U-Net without text": {"text": {"vocab_size": 600}},
    "lora: a U-Net without text": {"lora": {}},
    "score: a U-Net without text": {"score": {}},
    "train: a U-Net without text": {"train": ["unet", "text_encoder"]},
    "unet.attention_head_dim: a U-Net without text": {"unet": {"attention_head_dim": [2, 2]}},
    "unet.use_linear_projection: a U-Net without": {"unet": {"use_linear_projection": True}},
    "condition: classes red, Red: some are alike": {"condition": {"classes": ["red", "Red"]}},
    "unet.time_embedding: without text the U-Net with Fourier features divides by sigma": {
        "unet": {"time_embedding": "fourier"}
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_needs_text_is_refused_without(tmp_path, reason):
    config = validate(TrainConfig, tree(tmp_path / "run", **{**PIXELS, **REFUSED[reason]}))
    with pytest.raises(ConfigError) as caught:
        build(config, [], meta=True)
    assert str(caught.value).startswith(reason)


def test_the_command_line_draws_without_a_prompt_and_by_class(tmp_path, coloured):
    def sample(*arguments: str):
        return CliRunner().invoke(app, ["sample", "--steps", "2", *arguments])

    final = train(tmp_path / "run", duration="1 steps", **PIXELS)
    told = sample("--model", str(final), "--count", "3", "--out", str(tmp_path / "drawn"))
    assert told.exit_code == 0 and len(list((tmp_path / "drawn").glob("*.png"))) == 3
    final = train(tmp_path / "classes", duration="1 steps", **CLASSES | {"data": coloured})
    told = sample("red", "blue", "--model", str(final), "--out", str(tmp_path / "named"))
    assert told.exit_code == 0 and len(list((tmp_path / "named").glob("*.png"))) == 2
    assert sample("dog", "--model", str(final)).exit_code == 2


def test_digits():
    from ldm.demo.digits import DigitsData
    from ldm.errors import DataError

    source = DigitsData(digits=(3, 7), hold_out=0.2)
    try:
        count = len(source.examples)
    except DataError as error:
        assert "scikit-learn not installed: pip install" in str(error)
        pytest.skip("scikit-learn is not installed")
    assert 340 < count < 380 and 0.1 < source.held_out.mean() < 0.3
    assert {example.captions[0].split()[-1] for example in source.examples} == {"three", "seven"}
    pictures = [source.load(n) for n in range(20)]
    assert {picture.size for picture in pictures} == {(8, 8)} and pictures[0].mode == "L"
    assert max(picture.getextrema()[1] for picture in pictures) == 255
    assert source.digest(0) != source.digest(1)
    with pytest.raises(DataError, match="choose some of 0 to 9"):
        DigitsData(digits=(10,))
