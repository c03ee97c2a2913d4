"""``assets/ldm-small`` draws the same pictures through this pipeline and through stock."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from ldm.data.images import ImageTransform, to_image
from ldm.demo.checker import read
from ldm.demo.emoji import EmojiData
from ldm.demo.shape_suites import readable, scenes
from ldm.diffusion import predictor, process_of, target_of
from ldm.families import FamilyDenoiser
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import TextConditioner
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import Ddim, Heun
from runs import ROOT

FOLDER = ROOT / "assets" / "ldm-small"
PROMPTS = ["a red apple, twemoji style", "three small green hearts on a white background"]


@pytest.fixture(scope="module")
def pipes():
    ours = LatentDiffusionPipeline.from_pretrained(FOLDER)
    stock = StableDiffusionPipeline.from_pretrained(FOLDER)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    return ours, stock


# The others are slow: test_stock_pipeline asks the same of each, of a smaller model.
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.slow),
        pytest.param(EulerDiscreteScheduler, marks=pytest.mark.slow),
        pytest.param(PNDMScheduler, marks=pytest.mark.slow),
    ],
)
def test_same_latents_same_pictures_as_stock(pipes, scheduler):
    ours, stock = pipes
    side = ours.unet.config.sample_size
    shape = (2, ours.unet.config.in_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn = []
    for pipe in (ours, stock):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        pictures = pipe(
            PROMPTS,
            num_inference_steps=5,
            guidance_scale=7.5,
            latents=latents.clone(),
            output_type="np",
        ).images
        drawn.append(torch.from_numpy(pictures))
    assert drawn[0].shape == (2, 64, 64, 3)
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-4


def test_any_diffusers_pipeline_opens_it(pipes):
    opened = DiffusionPipeline.from_pretrained(FOLDER)
    assert type(opened) is StableDiffusionPipeline
    for name in ("unet", "vae", "text_encoder"):
        mine, theirs = (dict(getattr(p, name).named_parameters()) for p in (pipes[0], opened))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.slow
def test_held_out_pictures_come_back_from_the_noise_they_become(pipes):
    pytest.importorskip("resvg_py")
    captions = {
        "a snake, twemoji style",
        "a zipper-mouth face, openmoji style",
        "a potted plant, openmoji style",
        "a gem stone, openmoji style",
    }
    data, pipe = EmojiData(), pipes[0]
    held = [i for i, e in enumerate(data.examples) if e.held_out and captions & {*e.captions}]
    assert len(held) == 4
    pixels = []
    for index in held:
        white = Image.new("RGBA", (64, 64), "white")
        white.alpha_composite(data.load(index))
        pixels.append(torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1)
    config, codec = pipe.scheduler.config, VaeCodec(pipe.vae)
    process, target = process_of(config), target_of(config)
    predict = predictor(FamilyDenoiser(pipe.family, pipe.unet), target)
    with torch.no_grad():
        words = [data.examples[i].captions[0] for i in held]
        cond = TextConditioner(pipe.tokenizer, pipe.text_encoder).encode(words)
        latent = codec.encode(torch.stack(pixels)).mean
        seen = codec.decode(latent).clamp(-1, 1)
        # Measured over 8 pictures: DDIM 41.4 dB (median; one 25.7, the others 39.5 and more), Heun
        # 52.7 dB and more.
        for which, steps, least in (
            (Ddim(process, target), 100, 36),
            (Heun(process, target), 50, 45),
        ):
            noise = which(predict, latent, cond, steps=steps, start=0.0, stop=1.0)
            back = which(predict, noise, cond, steps=steps, start=1.0, stop=0.0)
            error = (codec.decode(back).clamp(-1, 1) - seen).square().flatten(1).mean(1)
            assert float((10 * (4 / error).log10()).min()) > least
            assert 0.7 < float(noise.std()) < 1.1


def test_its_autoencoder_leaves_shapes_readable(pipes):
    """Of 1,000 scenes the checker reads 998 without a mistake (0.2 % wrong [0.05, 0.7])."""
    codec = VaeCodec(pipes[0].vae)

    @torch.no_grad()
    def reconstruct(x):
        return codec.decode(codec.encode(x).mean).clamp(-1, 1)

    asked = scenes(20, held_out=True)
    found = readable(asked, ImageTransform(size=64), reconstruct)
    assert found.value == 1


def test_it_draws_what_the_words_say(pipes):
    """Red and green pictures are red and green: the text reaches the picture."""
    pictures = torch.from_numpy(
        pipes[0](
            [
                "a large red circle on a white background",
                "a large green circle on a white background",
            ],
            num_inference_steps=8,
            guidance_scale=3.0,
            sampler="ddim",
            seed=0,
            output_type="np",
        ).images
    )
    red, green, _ = pictures[:, 24:40, 24:40].mean((1, 2)).unbind(-1)
    assert red[0] > green[0] + 0.2
    assert green[1] > red[1] + 0.2


def test_its_lora_draws_in_four_evaluations_in_stock_as_well(pipes):
    """``assets/ldm-small-lcm``: what the words say, and the same latents as stock's."""
    texts = [
        "a large red circle on a white background",
        "a small green heart to the left of a medium yellow square on a white background",
    ]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = []
    for pipe, told in zip(pipes, ({"sampler": "lcm"}, {}), strict=True):
        own = pipe.scheduler
        pipe.load_lora_weights(ROOT / "assets" / "ldm-small-lcm")
        pipe.scheduler = LCMScheduler.from_config(own.config)
        seeds = [torch.Generator().manual_seed(n) for n in range(2)]
        call = dict(num_inference_steps=4, guidance_scale=1.0, latents=noise, generator=seeds)
        drawn.append(pipe(texts, output_type="latent", **call, **told).images)
        pipe.unload_lora_weights()
        pipe.scheduler = own
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-4
    pixels = VaeCodec(pipes[0].vae).decode(drawn[0])
    circle, two = (read(to_image(x)) for x in pixels)
    assert [thing.pair for thing in circle.things] == [("red", "circle")]
    assert {thing.pair for thing in two.things} == {("green", "heart"), ("yellow", "square")}
