"""Image to image and inpainting: ours are stock's, family by family."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from ldm.pipeline import LatentDiffusionPipeline
from stock import apart, generators, picture, quiet, scheduled

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*prompts:FutureWarning"),
]
PROMPTS = ["a red apple", "two dogs"]
KINDS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def sd() -> dict[str, Any]:
    return tiny.components()


def unguarded(cls: type, parts: dict[str, Any]) -> Any:
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return quiet(cls(**parts, **none))


PICTURES = [picture(seed=1), picture(seed=2)]
ARRAYS = np.stack([np.asarray(one) / np.float32(255) for one in PICTURES])
LATENTS = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (DDIMScheduler, {"image": picture(), "strength": 0.8}),
        (DDIMScheduler, {"image": LATENTS, "strength": 0.5}),
        (EulerDiscreteScheduler, {"image": picture(19, 21), "strength": 0.37}),
        (DPMSolverMultistepScheduler, {"image": ARRAYS, "strength": 0.5, "guidance_scale": 1.0}),
        (HeunDiscreteScheduler, {"image": torch.from_numpy(ARRAYS).movedim(3, 1), "strength": 0.5}),
    ],
)
def test_image_to_image_is_stocks(sd, kind, call):
    """Measured: 1.5e-6 at most. Counts are stock's: 8 x 0.37 is 2 steps, 8 x 0.8 is 6."""
    theirs = unguarded(StableDiffusionImg2ImgPipeline, scheduled(sd, kind))
    mine = quiet(LatentDiffusionPipeline(**scheduled(sd, kind)))
    asked = dict(prompt=PROMPTS, num_inference_steps=8, output_type="np") | call
    for draw in (generators, lambda: generators()[1]):
        found = [pipe(**asked, generator=draw()).images for pipe in (mine, theirs)]
        assert apart(*found) <= CLOSE


def inpainting_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = dict(tiny.unet().config) | {"in_channels": 2 * tiny.LATENT[0] + 1}
        return UNet2DConditionModel.from_config(config).eval()


def holed(width: int = 16, height: int = 16) -> Image.Image:
    """A mask of whole latent cells, which all ways to scale it down agree on."""
    mask = np.zeros((height, width), np.uint8)
    mask[4:12, 6:14] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_inpainting_is_stocks(sd, kind):
    """Of nine channels at any strength; of four with a picture in the noise: from noise alone stock
    leaves the mean of what it keeps out of its first step. (Of one picture for all it draws the
    latents once, so that those of the second depend on the first.)
    """
    call = dict(prompt=PROMPTS, image=PICTURES, mask_image=holed(), num_inference_steps=5)
    for unet, strengths in ((inpainting_unet(), (1.0, 0.6)), (sd["unet"], (0.6,))):
        parts = scheduled(sd | {"unet": unet}, kind)
        theirs = unguarded(StableDiffusionInpaintPipeline, parts)
        mine = quiet(LatentDiffusionPipeline(**parts))
        for strength in strengths:
            asked = call | {"strength": strength, "output_type": "latent"}
            found = [pipe(**asked, generator=generators()).images for pipe in (mine, theirs)]
            assert apart(*found) <= CLOSE, (kind, strength)


def test_a_part_of_a_picture_is_stocks(sd):
    """Of a part of the size that is drawn, so that nothing is made larger: what ours makes larger
    has what is known pasted in already.
    """
    photo, mask = picture(90, 60), np.zeros((60, 90), np.uint8)
    mask[20:36, 50:66] = 255
    parts = scheduled(sd | {"unet": inpainting_unet()}, DDIMScheduler)
    call = dict(prompt="a red apple", image=photo, mask_image=Image.fromarray(mask), strength=1.0)
    call |= dict(num_inference_steps=3, height=32, width=32, padding_mask_crop=8)
    theirs = unguarded(StableDiffusionInpaintPipeline, parts)
    mine = quiet(LatentDiffusionPipeline(**parts))
    found = [np.asarray(pipe(**call, generator=generators(1)).images[0]) for pipe in (mine, theirs)]
    first, second = (one.astype(int)[mask > 0] for one in found)
    assert np.abs(first - second).max() <= 1 and first.std() > 10


def test_sdxl_is_stocks():
    parts = tiny_sdxl.components(published=False)
    call: dict[str, Any] = dict(num_inference_steps=4, output_type="np", prompt=PROMPTS)
    call |= dict(image=PICTURES, guidance_scale=4.0, original_size=(40, 30))
    for kind in KINDS[:3]:
        made = scheduled(parts, kind)
        theirs = quiet(StableDiffusionXLImg2ImgPipeline(**made, add_watermarker=False))
        mine = quiet(LatentDiffusionPipeline(**made))
        asked = call | {"strength": 0.6}
        found = [pipe(**asked, generator=generators()).images for pipe in (mine, theirs)]
        assert apart(*found) <= CLOSE
    nine = dict(parts["unet"].config) | {"in_channels": 2 * tiny.LATENT[0] + 1}
    made = made | {"unet": UNet2DConditionModel.from_config(nine).eval()}
    theirs = quiet(StableDiffusionXLInpaintPipeline(**made, add_watermarker=False))
    asked = call | {"mask_image": holed(), "output_type": "latent"}
    mine = quiet(LatentDiffusionPipeline(**made))
    found = [pipe(**asked, strength=1.0, generator=generators()).images for pipe in (mine, theirs)]
    assert apart(*found) <= CLOSE


@pytest.mark.parametrize("strength", [0.5, 0.6])
def test_flows_are_stocks(strength):
    """Of 4 steps stock takes 2 of 0.5 and 3 of 0.6: rounded up, where SD rounds down."""
    call: dict[str, Any] = dict(prompt=PROMPTS, image=PICTURES, strength=strength)
    call |= dict(num_inference_steps=4, output_type="np", height=16, width=16)
    for cls, module in (
        (StableDiffusion3Img2ImgPipeline, tiny_sd3),
        (FluxImg2ImgPipeline, tiny_flux),
    ):
        parts = module.components()
        theirs = quiet(cls(**parts))
        theirs = theirs(**call, generator=generators(), max_sequence_length=module.LENGTH).images
        mine = quiet(LatentDiffusionPipeline(**parts, unet=None))
        asked = call | {"guidance_scale": 7.0}
        seen: list[int] = []

        def counted(pipe: Any, index: int, timestep: Any, tensors: Any, seen: list[int] = seen):
            seen.append(index)
            return tensors

        found = mine(**asked, generator=generators(), callback_on_step_end=counted).images
        assert len(seen) == (2 if strength == 0.5 else 3)
        assert apart(found, theirs) <= CLOSE, cls
