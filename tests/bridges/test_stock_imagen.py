"""Imagen: our pixels are those of stock's DeepFloyd IF, base and super-resolution; folders go both
ways.
"""

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import IFImg2ImgPipeline, IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from torch import Tensor

import tiny_imagen
from ldm.pipeline import LatentDiffusionPipeline
from ldm.prompts.windows import written
from stock import quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["A red apple ", "two dogs"]
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 6.0}
NOTHING = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stock(parts: dict[str, Any]) -> Any:
    cls = IFSuperResolutionPipeline if "image_noising_scheduler" in parts else IFPipeline
    return quiet(cls(**parts, **NOTHING, watermarker=None))


def ours(parts: dict[str, Any]) -> Any:
    return quiet(LatentDiffusionPipeline(**parts, vae=None))


def low() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=generator(7)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pipe: Any, prompts: Any = PROMPTS, **asked: Any) -> Tensor:
    """Pixels ``n 3 h w`` as they come."""
    form = "latent" if isinstance(pipe, LatentDiffusionPipeline) else "pt"
    return pipe(prompts, output_type=form, **{**CALL, "generator": generator(), **asked}).images


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return tiny_imagen.components(enlarges=False)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    return tiny_imagen.components(enlarges=True, seed=1)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": ["Blurred", "dogs"], "num_images_per_prompt": 2},
        {"height": 8, "width": 16},
    ],
    ids=["guided", "not guided", "negative", "wide"],
)
def test_a_base_draws_what_stock_draws(base, asked):
    theirs, mine = drawn(stock(base), **asked), drawn(ours(base), **asked)
    assert theirs.std() > 0.1 and apart(mine, theirs) <= 1e-6


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"noise_level": 0, "guidance_scale": 1.0},
        {"noise_level": 999, "negative_prompt": ["Blurred", ""]},
        {"num_images_per_prompt": 2, "noise_level": 30},
    ],
    ids=["as is", "not noised", "all noise", "several"],
)
def test_super_resolution_draws_what_stock_draws(large, asked):
    theirs = drawn(stock(large), image=low(), **asked)
    mine = drawn(ours(large), image=low(), **asked)
    assert theirs.shape[-2:] == (16, 16) and theirs.std() > 0.1 and apart(mine, theirs) <= 1e-6


def test_what_the_network_is_told(base, large):
    pipe = ours(large)
    plain = drawn(pipe, image=low(), noise_level=5)
    assert apart(drawn(pipe, image=low().flip(0), noise_level=5), plain) > 0.1
    assert apart(drawn(pipe, image=low(), noise_level=300), plain) > 1e-2
    assert apart(drawn(pipe, ["two dogs"] * 2, image=low(), noise_level=5), plain) > 1e-3
    # A picture of its own seed, whatever its company, but for rounding (of which the first level
    # of this noise makes 20,000 times as much).
    seeded = {"image": low(), "seed": 3, "generator": None}
    whole = drawn(pipe, **seeded)
    assert apart(drawn(pipe, **seeded, batch_size=1), whole) <= 1e-3
    alone = drawn(pipe, PROMPTS[1:], image=low()[1:], seed=4, generator=None)
    assert apart(alone, whole[1:]) <= 1e-3
    # Pictures and arrays as stock reads them; one for all.
    levels = ((low()[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    picture = Image.fromarray(levels)
    for image in (picture, [picture], (levels / np.float32(127.5) - 1)[None]):
        one = drawn(pipe, PROMPTS[:1], image=image)
        assert apart(one, drawn(stock(large), PROMPTS[:1], image=image)) <= 1e-6
    assert drawn(pipe, image=picture).shape[0] == 2
    assert (ours(base).sampling_defaults.num_inference_steps, ours(base).reads) == (100, None)


def test_a_base_edits_a_picture_as_stock_does(base):
    stock = quiet(IFImg2ImgPipeline(**base, **NOTHING, watermarker=None))
    for strength in (0.4, 0.7):
        theirs = drawn(stock, image=low(), strength=strength)
        mine = drawn(ours(base), image=low(), strength=strength)
        # The picture passes through [0, 1], which rounds it.
        assert theirs.std() > 0.1 and apart(mine, theirs) <= 2e-5


def test_other_wordings_of_the_same_text(base):
    """What stock's tower says in place of texts, and texts of another syntax that say no more."""
    plain, pipe = drawn(ours(base)), ours(base)
    said = dict(zip(("prompt_embeds", "negative_prompt_embeds"),
                    stock(base).encode_prompt(PROMPTS), strict=True))  # fmt: skip
    assert apart(drawn(pipe, None, **said), plain) <= 1e-6
    assert torch.equal(drawn(pipe, prompt_syntax="a1111"), plain)
    assert apart(drawn(pipe, ["A (red:1.5) apple", "two dogs"], prompt_syntax="a1111"), plain) > 0
    printed = written(pipe.conditioner, 1).towers["text_encoder"].printed
    assert {"masked", "lower"} <= {*printed[1]}


def test_thresholding_of_named_samplers_is_that_of_the_scheduler():
    """At a guidance that drives pixels out of bounds: none, static, dynamic."""
    found = {}
    for kind, told in (
        ("none", {"thresholding": False, "clip_sample": False}),
        ("static", {"thresholding": False}),
        ("dynamic", {"sample_max_value": 100.0}),
    ):
        pipe = ours(tiny_imagen.components(enlarges=False, **told))
        asked = {"guidance_scale": 30.0, "num_inference_steps": 4, "seed": 0, "generator": None}
        found[kind] = drawn(pipe, PROMPTS[:1], **asked, sampler="ddim")
        assert (float(found[kind].abs().max()) > 1.5) == (kind == "none")
    saturated = {kind: float((x.abs() > 0.99).float().mean()) for kind, x in found.items()}
    assert saturated["dynamic"] < saturated["static"] / 2 and saturated["static"] > 0.05


def test_folders_go_both_ways(tmp_path, base, large, caplog):
    for name, parts, asked in (("base", base, {}), ("large", large, {"image": low()})):
        pipe, folder = ours(parts), tmp_path / name
        pipe.save_pretrained(folder / "ours")
        index = json.loads((folder / "ours" / "model_index.json").read_text())
        cls = IFPipeline if name == "base" else IFSuperResolutionPipeline
        assert index["_class_name"] == cls.__name__ and not {"vae", "classes"} & set(index)
        assert ("image_noising_scheduler" in index) == (name == "large")
        with caplog.at_level(logging.WARNING):
            theirs = quiet(cls.from_pretrained(folder / "ours"))
            mine = quiet(LatentDiffusionPipeline.from_pretrained(folder / "ours"))
        wrong = [line for line in caplog.messages if "config" in line or "expected" in line.lower()]
        assert not wrong
        picture = drawn(theirs, **asked)
        assert apart(drawn(mine, **asked), picture) <= 1e-6 and mine.family.name == "imagen"
        theirs.save_pretrained(folder / "theirs")
        again = quiet(LatentDiffusionPipeline.from_pretrained(folder / "theirs"))
        assert apart(drawn(again, **asked), picture) <= 1e-6


def test_what_is_refused(base, large):
    for parts, wrong, message in (
        (large, {}, "image: this model enlarges a picture: pass one, or use a Cascade"),
        (large, {"image": low()[:, :2]}, "image must be a PIL picture, a tensor 3 h w"),
        (large, {"image": torch.cat([low(), low()])}, "image: 4 pictures for 2 prompts"),
        (large, {"image": low(), "noise_level": 1000}, r"noise_level must be .*0\.\.999, not 1"),
        (large, {"image": low() * torch.nan}, "image: the picture holds nan or inf"),
        (base, {"noise_level": 3}, "noise_level: this model is told no picture"),
        (large, {"image": low(), "strength": 0.5}, "strength edits a picture, and this model enl"),
        (large, {"image": low(), "mask_image": low()[:, 0]}, "mask_image edits a picture, and"),
        (large, {"image": low(), "denoising_start": 0.5}, "image and denoising_start belong"),
        (base, {"strength": 0.5}, "strength needs an image: the picture that is edited"),
        (base, {"original_size": (1, 1)}, "original_size is no argument of a model of .* imagen"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            drawn(ours(parts), **wrong)
        assert "\n" not in str(caught.value)
