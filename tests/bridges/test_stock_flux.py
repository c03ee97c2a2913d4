"""Flux.1: our latents are stock's, dev's and schnell's, at two sizes; folders go both ways."""

import copy
import json
import logging
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import tiny_flux
from ldm.pipeline import LatentDiffusionPipeline
from stock import quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["a red apple", "two dogs"]
SMALL, WIDE = {"height": 16, "width": 16}, {"height": 12, "width": 24}
TRUE = {"true_cfg_scale": 3.0, "negative_prompt": ["blurred", ""]}
CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}


def stock(parts: dict[str, Any]) -> Any:
    return quiet(FluxPipeline(**parts))


def ours(parts: dict[str, Any]) -> Any:
    return quiet(LatentDiffusionPipeline(**parts, unet=None))


@pytest.fixture(scope="module", params=["dev", "schnell"])
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    return tiny_flux.components(dev=request.param == "dev")


def drawn(pipe: Any, asked: dict[str, Any]) -> Tensor:
    """Latents ``n c h w``: stock's are packed."""
    told = {**CALL, **asked, "generator": torch.Generator().manual_seed(0)}
    if isinstance(pipe, LatentDiffusionPipeline):
        return pipe(**told).images
    packed = pipe(**{"max_sequence_length": tiny_flux.LENGTH} | told).images
    return FluxPipeline._unpack_latents(packed, told["height"], told["width"], 2)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "call",
    [
        SMALL,
        WIDE | {"guidance_scale": 7.0, "num_images_per_prompt": 2},
        SMALL | TRUE,
        WIDE | TRUE | {"guidance_scale": 1.0},
        SMALL | {"true_cfg_scale": 3.0},
        SMALL | {"negative_prompt": "blurred"},
        SMALL | TRUE | {"max_sequence_length": 4},
        WIDE | {"max_sequence_length": 30},
    ],
    ids=[
        *("default", "wide", "true", "wide, true", "nothing negative", "no true scale"),
        *("4 tokens", "30 tokens"),
    ],
)
def test_latents_are_those_of_stock(parts, call):
    asked = {"prompt": PROMPTS, **call}
    theirs, mine = drawn(stock(parts), asked), drawn(ours(parts), asked)
    assert theirs.std() > 0.1 and apart(mine, theirs) <= 1e-6


def test_what_the_scales_do(parts):
    pipe, dev = ours(parts), parts["transformer"].config.guidance_embeds
    plain = drawn(pipe, {"prompt": "two dogs", **SMALL})
    told = drawn(pipe, {"prompt": "two dogs", **SMALL, "guidance_scale": 1.0})
    assert (apart(told, plain) > 1e-3) == dev and (dev or torch.equal(told, plain))
    true = drawn(pipe, {"prompt": "two dogs", **SMALL, "negative_prompt": "", "true_cfg_scale": 4})
    assert apart(true, plain) > 1e-3
    how = pipe.sampling_defaults
    assert (how.num_inference_steps, how.guidance_scale, how.sampler) == (28, 3.5, "flow-euler")
    # By its name, and on ways that take no sigmas of one's own.
    named = {"prompt": "two dogs", **SMALL, "sampler": "flow-euler"}
    assert apart(drawn(pipe, named), plain) <= 1e-6
    if not dev:
        assert drawn(pipe, named | {"sampler": "flow-heun"}).isfinite().all()


def test_the_shift_goes_by_the_size():
    parts = tiny_flux.components()

    def draw(scheduler: Any, size: dict[str, int]) -> Tensor:
        return drawn(ours(parts | {"scheduler": scheduler}), {"prompt": "two dogs", **size})

    for size, tokens in ((SMALL, 16), (WIDE, 18)):
        mu = 0.5 + 0.65 * (tokens - 4) / 16
        fixed = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=mu, max_shift=mu
        )
        by_size = draw(parts["scheduler"], size)
        assert apart(draw(fixed, size), by_size) < 1e-6
        assert apart(draw(FlowMatchEulerDiscreteScheduler(), size), by_size) > 1e-3


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_folders_go_both_ways(tmp_path, parts, half, caplog):
    pipe = ours(copy.deepcopy(parts))
    variant = "fp16" if half else None
    if half:
        pipe.to(torch.float16)
    pipe.family.state_side(pipe.transformer, 8)
    pipe.save_pretrained(tmp_path / "ours", variant=variant)
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline" and index["image_encoder"] == [None, None]
    assert not {"unet", "safety_checker", "text_encoder_3", "classes"} & set(index)
    call = {"prompt": "a red apple", **SMALL}
    with caplog.at_level(logging.WARNING):
        theirs = quiet(FluxPipeline.from_pretrained(tmp_path / "ours", variant=variant))
        mine = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "ours", variant=variant))
    assert not [line for line in caplog.messages if "config" in line or "expected" in line.lower()]
    picture = drawn(theirs, call)
    assert apart(drawn(mine, call), picture) <= 1e-6
    assert mine("a red apple", **CALL).images.shape == (1, 16, 8, 8)  # as the folder states
    if half:
        theirs.to(torch.float16)
    theirs.save_pretrained(tmp_path / "theirs", variant=variant)
    again = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs", variant=variant))
    assert again.family.name == "flux" and apart(drawn(again, call), picture) <= 1e-6


def test_pictures_and_what_is_refused():
    pipe = ours(tiny_flux.components())
    images = pipe("a red apple", num_inference_steps=1, output_type="pt", **SMALL).images
    assert images.shape == (1, 3, 16, 16) and bool(images.isfinite().all())
    assert pipe.family.side(pipe.transformer) == 128  # as in stock
    for wrong, message in (
        ({"height": 18}, "height must be a multiple of 4 pixels, not 18"),
        ({"original_size": (16, 16)}, "original_size is no argument of a model of the family flux"),
        ({"true_cfg_scale": "much"}, "true_cfg_scale must be a finite number, not 'much'"),
        ({"num_inference_steps": 0}, r"steps must lie in 1\.\.1000"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a red apple", **SMALL | {"num_inference_steps": 1} | wrong)
