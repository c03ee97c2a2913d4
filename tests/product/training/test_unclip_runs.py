"""unCLIP trained: a prior and a decoder, from random init and from folders. Embeddings are the same
cached or not, killed or not, and both become one folder of stock's.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import tiny
from launched import ENVIRONMENT, TRAIN, digests, launch, logged, losses, steps, wait_for
from ldm.cli import app
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import to_pixels
from ldm.diffusion import DiscreteVP
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.models.aside import Aside
from ldm.models.embedding import ImageEmbedding, PictureTower
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from ldm.tasks.estimate import trace
from runs import train, tree
from stock import quiet

WIDTH = 32
EYE = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "layers": 1,
       "heads": 2, "projection": WIDTH}  # fmt: skip
CALL: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=2.0, output_type="latent")


def decoder(**changes: Any) -> dict[str, Any]:
    return {
        "family": "unclip", "image_encoder": EYE, "text_dropout": 0.5, "objective": {"target": "v"},
        "aside": {"kind": "image_embedding", "dropout": 0.3}, "optimizer": {"lr": 1e-2},
        "duration": "4 steps", "checkpoints": {"every": "2 steps", "keep": 1},
        "batch_size": 6,  # of 114 views no rest, which an autoencoder would round otherwise
        **changes,
    }  # fmt: skip


def prior(**changes: Any) -> dict[str, Any]:
    return {
        "family": "unclip_prior", "image_encoder": EYE, "vae": None, "unet": None,
        "prior": {"layers": 1, "heads": 2, "head_dim": 8}, "objective": {"target": "x0"},
        "process": {"schedule": "cosine"}, "optimizer": {"lr": 1e-2}, "duration": "4 steps",
        "text": {"projection": WIDTH}, "batch_size": 6,
        "checkpoints": {"every": "2 steps", "keep": 1}, **changes,
    }  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_training(config: TrainConfig) -> Tensor:
    """All pictures that are trained on, in the first of their views."""
    items = Collection(config.data, config.images).train
    return torch.stack([to_pixels(config.images(items[n].load())) for n in range(len(items))])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A decoder and a prior, cached, with what they saw on their way."""
    root = tmp_path_factory.mktemp("unclip")
    os.environ["LDM_CACHE"], before = str(root / "cache"), os.environ.get("LDM_CACHE")
    validation = {"every": "2 steps", "images": 2, "levels": 2, "steps": 2, "captions": 2}
    train(root / "decoder", **decoder(), validation=validation)
    train(root / "prior", **prior(), validation=validation | {"captions": 0})
    if before is None:
        del os.environ["LDM_CACHE"]
    else:
        os.environ["LDM_CACHE"] = before
    return root


@pytest.fixture(autouse=True)
def cache(runs, monkeypatch) -> None:
    for place in (os.environ, ENVIRONMENT):
        monkeypatch.setitem(place, "LDM_CACHE", str(runs / "cache"))


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_caches_and_interruptions_change_no_bit(name, runs, tmp_path):
    made, statistics = {"decoder": (decoder, "image_normalizer/mean"),
                        "prior": (prior, "prior/clip_mean")}[name]  # fmt: skip
    whole = losses(runs / name)
    held_out = logged(runs / name, "held_out_loss")
    assert len(whole) == 4 and len(held_out) == 2 and held_out[0] > 0
    assert any((runs / "cache" / "asides").rglob("*.safetensors"))
    told = made(cache_latents=False, cache_text=False)
    train(tmp_path / "bare", **told | {"duration": "2 steps"})
    train(tmp_path / "bare", **told)
    assert losses(tmp_path / "bare") == whole
    both = [digests(folder / "final", at_least=1) for folder in (tmp_path / "bare", runs / name)]
    assert both[0] == both[1]
    # Embeddings are normalised by what was measured of the training pictures.
    config = validate(TrainConfig, tree(tmp_path / "bare", **told))
    pipe = LatentDiffusionPipeline.from_pretrained(runs / name / "final")
    eye = PictureTower(pipe.image_encoder, pipe.feature_extractor)
    with torch.no_grad():
        every = eye(of_training(config))
    part, key = statistics.split("/")
    network = getattr(pipe, part)
    mean, std = (getattr(network, k)[0] for k in (key, key.replace("mean", "std")))
    assert torch.allclose(std / every.std(0, correction=0), torch.tensor(1.0), atol=1e-3)
    assert ((mean - every.mean(0)).abs() <= std / 2000).all()


def test_a_killed_run_ends_in_the_same_bits(runs, tmp_path):
    told = decoder(cache_latents=False)
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / "killed", **told)))
    process = launch(TRAIN, "--config", file)
    wait_for(lambda: steps(tmp_path / "killed") >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    train(tmp_path / "killed", **told)
    assert losses(tmp_path / "killed") == losses(runs / "decoder")
    both = [digests(f / "final", at_least=1) for f in (tmp_path / "killed", runs / "decoder")]
    assert both[0] == both[1]


def test_a_teacher_is_told_the_embedding(runs, tmp_path):
    told = decoder(unet=None, vae=None, text=None, image_encoder=None, objective={})
    asked = {"kind": "guidance", "guidance": 1}  # what the student says before it has learnt
    del told["family"]
    final = runs / "decoder" / "final"
    train(tmp_path / "run", **told | {"duration": "1 step"}, model=str(final), distil=asked)
    assert losses(tmp_path / "run") == [0.0]


def test_what_is_measured_is_kept_where_text_encoders_are_rounded(runs, tmp_path):
    final = train(tmp_path / "run", **decoder(frozen="bfloat16", duration="2 steps"))
    for part in ("image_normalizer", "image_encoder", "text_encoder", "vae"):
        both = [digests(f / part, at_least=1) for f in (final, runs / "decoder" / "final")]
        assert both[0] == both[1], part


def test_both_become_one_folder_of_stock_s(runs, tmp_path):
    parts = [str(runs / name / "final") for name in ("prior", "decoder")]
    told = ["export", str(tmp_path / "whole"), "--prior", parts[0], "--decoder", parts[1]]
    made = CliRunner().invoke(app, told)
    assert made.exit_code == 0, made.output
    asked: dict[str, Any] = CALL | {"prior_num_inference_steps": 2}
    theirs = quiet(StableUnCLIPPipeline.from_pretrained(tmp_path / "whole"))
    mine = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "whole"))
    drawn = theirs("a ring", generator=generator(), **asked).images
    again = mine("a ring", generator=generator(), **asked).images
    assert drawn.std() > 0.3 and (again - drawn).abs().max() <= 1e-4
    picture = Image.new("RGB", (16, 16), (200, 30, 30))
    theirs = quiet(StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "whole"))
    drawn = theirs(image=picture, generator=generator(), **CALL).images
    again = mine(image=picture, generator=generator(), **CALL).images
    assert (again - drawn).abs().max() <= 1e-4
    # The prior alone says what it says before the decoder.
    alone = quiet(LatentDiffusionPipeline.from_pretrained(parts[0]))
    embeds = alone("a ring", num_inference_steps=2, generator=generator()).images
    assert embeds.shape == (1, WIDTH) and embeds.isfinite().all()
    latent = alone("a ring", output_type="latent", num_inference_steps=2, generator=generator())
    assert torch.allclose(alone.codec.decode(latent.images), embeds, atol=1e-6)
    with pytest.raises(ValueError, match="image: a prior draws embeddings of texts: leave it out"):
        alone("a ring", image=picture)
    for wrong, message in (
        (["--prior", parts[0]], "--prior and --decoder belong together"),
        (["--prior", parts[1], "--decoder", parts[1]], "--prior .* is no prior of unCLIP"),
        (["--prior", parts[0], "--decoder", parts[0]], "--decoder .* is no decoder of unCLIP"),
        (["--model", parts[1], "--prior", parts[0], "--decoder", parts[1]], "--model is"),
    ):
        made = CliRunner().invoke(app, ["export", str(tmp_path / "other"), *wrong])
        assert made.exit_code and re.search(message, " ".join(made.output.split())), made.output


def test_it_begins_as_stable_diffusion_and_goes_on_from_its_folder(tmp_path, runs):
    base = tiny.folder(tmp_path / "base", "v")
    told = decoder(model=str(base), vae=None, text=None, unet=None, process={}, objective={})
    grown = build(validate(TrainConfig, tree(tmp_path / "run", **told)), [], meta=False)
    assert grown.measures and grown.network.config.class_embed_type == "projection"
    own = LatentDiffusionPipeline.from_pretrained(base)
    x, time = torch.randn(2, *tiny.LATENT, generator=generator()), torch.full((2,), 7.0)
    cond = own.conditioner.encode(["a", "b"])
    with torch.no_grad():
        plain = own.unet(x, time, encoder_hidden_states=cond.tokens).sample
        cond.extra["embedded"] = torch.randn(2, 2 * WIDTH, generator=generator(1))
        assert torch.equal(grown.denoiser(x, time, cond), plain)  # it says nothing yet
    with pytest.raises(ConfigError, match="lora: the U-Net of .* is told no embedding yet"):
        build(validate(TrainConfig, tree(tmp_path / "run", **told, lora={})), [], meta=True)
    for name, made in (("decoder", decoder), ("prior", prior)):
        folder = str(runs / name / "final")
        more = made(model=folder, vae=None, text=None, unet=None, prior=None, image_encoder=None,
                    family=None, process={}, objective={}, duration="1 steps")  # fmt: skip
        final = train(tmp_path / name, **more)
        for part in ("image_normalizer", "image_encoder"):
            if (Path(folder) / part).is_dir():
                both = [digests(Path(f) / part, at_least=1) for f in (final, folder)]
                assert both[0] == both[1]
        for part in ("scheduler", "image_noising_scheduler"):
            texts = [(Path(f) / part / "scheduler_config.json") for f in (final, folder)]
            assert not texts[1].exists() or texts[0].read_text() == texts[1].read_text()


@pytest.mark.parametrize(
    ("made", "unread"),
    [
        # First: only the first trace of a process refuses to move a network to where it is.
        (decoder(cache_latents=False), ["text_encoder"]),
        (decoder(), ["vae", "image_encoder", "text_encoder"]),
        (prior(), ["image_encoder", "text_encoder"]),
    ],
    ids=["not cached", "decoder", "prior"],
)
def test_a_dry_run_counts_what_is_read(made, unread):
    config = validate(TrainConfig, tree(Path("run"), **made))
    step = text_to_image.step(config)
    assert step.task.encoder.unread == unread
    cost = trace(config, step, 6, 1)
    family = step.task.model.family
    learning = sum(p.numel() for p in step.networks[family.network].parameters())
    learning -= 2 * WIDTH if family.embeds else 0
    assert cost.learning == 4 * learning and cost.product > 0
    embedding, moments = 4 * WIDTH, 4 * 2 * 4 * 8 * 8
    kept = 2 * embedding if family.embeds else moments + embedding
    assert step.cached[0] == (kept if config.cache_latents else 0)


def test_what_is_drawn_for_a_picture_is_its_own():
    config = validate(TrainConfig, tree(Path("run"), **decoder()))
    model = build(config, ["a ring"])
    tower = PictureTower(model.networks["image_encoder"], model.tokenizers["feature_extractor"])
    normaliser = model.networks["image_normalizer"]
    aside = ImageEmbedding(tower, normaliser, DiscreteVP("cosine"), (0.0, 1.0), 0.25)
    assert isinstance(aside, Aside) and isinstance(model.aside, ImageEmbedding)
    one, same, other = (aside.drawn(3, n, (16, 8)) for n in (5, 5, 6))
    assert one["noise"].shape == (WIDTH,) and torch.equal(one["noise"], same["noise"])
    assert not torch.equal(one["noise"], other["noise"]) and one["level"] == same["level"]
    every = [aside.drawn(0, n, (4, 4)) for n in range(400)]
    levels = torch.stack([drawn["level"] for drawn in every]).double()
    assert 0 <= levels.min() and levels.max() <= 999 and abs(levels.mean() - 499.5) < 50
    assert abs(torch.stack([drawn["told"] for drawn in every]).double().mean() - 0.75) < 0.06
    # alpha e + sigma noise where mean and standard deviation are 0 and 1; what is not told is 0.
    normaliser.mean.data.fill_(2.0)
    normaliser.std.data.fill_(3.0)
    embedding = torch.randn(2, WIDTH, generator=generator())
    drawn = {name: torch.stack([value, value]) for name, value in one.items()}
    drawn["told"] = torch.tensor([True, False])
    told = aside.told({"embedding": embedding}, drawn)["embedded"]
    alpha = aside.process.table.alpha[int(one["level"])]
    mixed = alpha * (embedding[0].double() - 2) / 3 + (1 - alpha**2).sqrt() * one["noise"].double()
    assert torch.allclose(told[0, :WIDTH].double(), 3 * mixed + 2, atol=1e-5)
    assert told.shape == (2, 2 * WIDTH) and bool((told[1] == 0).all())
    assert torch.allclose(told[0, WIDTH], one["level"].cos().float(), atol=1e-4)


WRONG = {
    "aside.kind: a model of the family unclip is told image_embedding": decoder(
        aside={"kind": "low_resolution"}
    ),
    "validation.prompts: this model is also told something of the picture itself": decoder(
        validation={"every": "2 steps", "prompts": ["a ring"]}
    ),
    "validation.captions: a prior draws no pictures": prior(
        validation={"every": "2 steps", "captions": 2}
    ),
    "validation.prompts: a prior draws embeddings": prior(
        validation={"every": "2 steps", "prompts": ["a ring"]}
    ),
    "vae: the latents of the family unclip_prior are embeddings": prior(vae={"norm_num_groups": 4}),
    "unet: a model of the family unclip_prior has none, but a prior": prior(
        unet={"block_out_channels": [16]}, prior=None
    ),
    "unet and prior are two kinds of networks": prior(unet={"block_out_channels": [16]}),
    "text: a prior reads tokens as wide as embeddings are": prior(
        image_encoder=EYE | {"projection": 24}
    ),
    "image_encoder: a model of the family sd has no picture tower": {"image_encoder": EYE},
    "image_encoder is not described: give image_encoder, or model": decoder(image_encoder=None),
    "train: a PriorTransformer, prior, can have no LoRA": prior(lora={}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(validate(TrainConfig, tree(Path("run"), **WRONG[message])), [], meta=True)
    assert "\n" not in str(caught.value)
