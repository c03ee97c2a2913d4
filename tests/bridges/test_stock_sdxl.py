"""SDXL: our latents are stock's, folders go both ways, and base and refiner hand over."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

import tiny
import tiny_sdxl
from ldm.pipeline import LatentDiffusionPipeline
from stock import scheduled
from turns import turns

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["a red apple", "two dogs"]
KINDS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler,
         UniPCMultistepScheduler]  # fmt: skip


def stock(parts: dict[str, Any], cls: type = StableDiffusionXLPipeline) -> Any:
    more = {"requires_aesthetics_score": True} if parts["text_encoder"] is None else {}
    pipe = cls(**parts, add_watermarker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny_sdxl.components(published=False)


@pytest.fixture(scope="module")
def refiner(parts: dict[str, Any]) -> dict[str, Any]:
    return tiny_sdxl.components(seed=1, refiner=True, published=False) | {"vae": parts["vae"]}


def ours(parts: dict[str, Any]) -> LatentDiffusionPipeline:
    pipe = LatentDiffusionPipeline(**parts, requires_aesthetics_score=parts["text_encoder"] is None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


CALLS: dict[str, dict[str, Any]] = {
    "no negative": {},
    "empty negative": {"negative_prompt": ["", ""]},
    # Of one prompt: of several, stock hands the numbers of every second to the wrong one.
    "sizes and crops": {
        "prompt": "a red apple",
        "negative_prompt": "blurred",
        "original_size": (40, 30),
        "crops_coords_top_left": (7, 3),
        "target_size": (16, 12),
        "negative_original_size": (10, 10),
        "negative_crops_coords_top_left": (1, 0),
        "negative_target_size": (64, 64),
    },
    "two images a prompt": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize(("kind", "call"), turns(KINDS, CALLS))
def test_latents_are_those_of_stock(parts, kind, call):
    asked: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 5.0}
    asked |= {"output_type": "latent", "height": 16, "width": 24, **CALLS[call]}
    made = scheduled(parts, kind)
    theirs = stock(made)(generator=generator(), **asked).images
    mine = ours(scheduled(parts, kind))(generator=generator(), **asked).images
    assert theirs.std() > 0.1 and apart(mine, theirs) <= 1e-6 * float(theirs.abs().max())


def test_no_negative_is_zeros_where_the_folder_says_so(parts):
    def draw(**asked: Any) -> Tensor:
        pipe.scheduler = tiny.scheduler()
        call = dict(num_inference_steps=2, guidance_scale=5.0, output_type="latent")
        return pipe("a red apple", generator=generator(), **call, **asked).images

    pipe = ours(parts)
    zeros, empty = draw(), draw(negative_prompt="")
    assert apart(zeros, empty) > 1e-3
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert apart(draw(), empty) == 0


@pytest.mark.parametrize("kind", [*KINDS, HeunDiscreteScheduler], ids=lambda kind: kind.__name__)
def test_base_hands_over_to_the_refiner_as_in_stock(parts, refiner, kind):
    asked = dict(prompt=PROMPTS, num_inference_steps=10, guidance_scale=5.0, output_type="latent")
    told = dict(original_size=(40, 30), crops_coords_top_left=(7, 3), target_size=(16, 16))
    theirs = stock(scheduled(parts, kind))(
        generator=generator(), denoising_end=0.8, **asked, **told
    ).images
    mine = ours(scheduled(parts, kind))(
        generator=generator(), denoising_end=0.8, **asked, **told
    ).images
    most = float(theirs.abs().max())
    assert apart(mine, theirs) <= 1e-6 * most
    told |= dict(aesthetic_score=7.0, negative_aesthetic_score=2.0, denoising_start=0.8)
    theirs = stock(scheduled(refiner, kind), StableDiffusionXLImg2ImgPipeline)(
        image=theirs, generator=generator(), **asked, **told
    ).images
    mine = ours(scheduled(refiner, kind))(image=mine, generator=generator(), **asked, **told).images
    assert apart(mine, theirs) <= 2e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("refines", [False, True], ids=["base", "refiner"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folders_go_both_ways(parts, refiner, tmp_path, refines, variant):
    made = refiner if refines else parts
    cls = StableDiffusionXLImg2ImgPipeline if refines else StableDiffusionXLPipeline
    pipe = ours(made | {"scheduler": tiny.scheduler()})
    call = dict(num_inference_steps=3, guidance_scale=4.0, output_type="latent")
    if refines:
        image = torch.randn(1, *tiny.LATENT, generator=generator())
        call |= dict(image=image, denoising_start=0.5)
    drawn = pipe("a red apple", generator=generator(), **call).images
    pipe.save_pretrained(tmp_path / "ours", variant=variant)
    theirs = cls.from_pretrained(tmp_path / "ours", add_watermarker=False, variant=variant)
    theirs.set_progress_bar_config(disable=True)
    assert apart(theirs("a red apple", generator=generator(), **call).images, drawn) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    again.set_progress_bar_config(disable=True)
    assert again.family.name == "sdxl"
    assert apart(again("a red apple", generator=generator(), **call).images, drawn) < 1e-5


def test_what_it_cannot_be_told_is_refused(parts):
    pipe = ours(parts | {"scheduler": tiny.scheduler()})
    for wrong, message in (
        ({"aesthetic_score": 6.0}, "aesthetic_score: this model is told no aesthetic score"),
        ({"original_size": 40}, "original_size must be two numbers"),
        ({"orignal_size": (40, 40)}, "orignal_size is no argument of a model of the family sdxl"),
        ({"denoising_start": 0.8}, "image and denoising_start belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a red apple", num_inference_steps=2, **wrong)
    with pytest.raises(
        ValueError, match="original_size is no argument of a model of the family sd"
    ):
        tiny.pipeline()("a red apple", num_inference_steps=2, original_size=(40, 40))
