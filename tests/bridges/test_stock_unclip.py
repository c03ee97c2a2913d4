"""unCLIP: our latents are those of stock's Stable unCLIP, of texts and of pictures; folders go both
ways.
"""

import json
from typing import Any

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from PIL import Image
from torch import Tensor

import tiny_unclip
from ldm.cascade import Cascade
from ldm.editing.embeddings import interpolated, principal, text_diff
from ldm.pipeline import LatentDiffusionPipeline
from stock import quiet
from tiny import aligned

PROMPTS = ["a red apple", "two dogs"]
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
OF_PRIOR = {"prior_num_inference_steps": 3, "prior_guidance_scale": 3.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock(cls: Any, parts: dict[str, Any]) -> Any:
    known = cls._get_signature_keys(cls)[0]
    return quiet(cls(**{name: part for name, part in parts.items() if name in known}))


def ours(parts: dict[str, Any]) -> Any:
    return quiet(LatentDiffusionPipeline(**parts))


def drawn(pipe: Any, *given: Any, **asked: Any) -> Tensor:
    return pipe(*given, **{**CALL, "generator": generator(), **asked}).images


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return tiny_unclip.components(whole=True)


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (20, 24, 3), generator=generator(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"noise_level": 300, "negative_prompt": ["blurred", ""]},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0, "num_images_per_prompt": 2},
    ],
    ids=["guided", "noised", "not guided"],
)
def test_texts_draw_what_stock_draws(whole, asked):
    told = OF_PRIOR | asked
    theirs = drawn(stock(StableUnCLIPPipeline, whole), PROMPTS, **told)
    mine = drawn(ours(whole), PROMPTS, **told)
    assert theirs.std() > 0.3 and apart(mine, theirs) <= 1e-4
    assert apart(drawn(ours(whole), PROMPTS, **told, generator=generator(1)), mine) > 0.1


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"noise_level": 999, "num_images_per_prompt": 2},
        {"prompt": "a red apple", "negative_prompt": "blurred", "guidance_scale": 1.5},
    ],
    ids=["as is", "all noise, several", "with a text"],
)
def test_variations_are_those_of_stock(whole, asked):
    theirs = drawn(stock(StableUnCLIPImg2ImgPipeline, whole), image=picture(), **asked)
    mine = drawn(ours(whole), image=picture(), **asked)
    assert theirs.std() > 0.3 and apart(mine, theirs) <= 1e-4


def test_embeddings_in_place_of_pictures(whole):
    pipe = ours(whole)
    embeds = pipe.embed([picture(0), picture(1)])
    assert embeds.shape == (2, tiny_unclip.WIDTH) and apart(embeds[:1], embeds[1:]) > 1e-2
    both = drawn(pipe, PROMPTS, image_embeds=embeds)
    theirs = stock(StableUnCLIPImg2ImgPipeline, whole)
    assert apart(both, drawn(theirs, prompt=PROMPTS, image_embeds=embeds)) <= 1e-4
    # What is drawn by a generator of its own does not depend on what is drawn beside it.
    seeded = {"image_embeds": embeds, "seed": 3, "generator": None}
    every = drawn(pipe, PROMPTS, **seeded)
    assert apart(drawn(pipe, PROMPTS, **seeded, batch_size=1), every) <= 1e-4
    alone = drawn(pipe, PROMPTS[1:], image_embeds=embeds[1:], seed=4, generator=None)
    assert apart(alone, every[1:]) <= 1e-4
    # The ends of an interpolation are the two, and what lies between is as long.
    a, b = embeds[:1], embeds[1:]
    assert apart(interpolated(a, b, 0.0), a) <= 1e-5 and apart(interpolated(a, b, 1.0), b) <= 1e-5
    middle = interpolated(a, b, 0.5)
    assert torch.allclose(middle.norm(), (a.norm() + b.norm()) / 2)
    cosines = torch.nn.functional.cosine_similarity(middle, torch.cat([a, b]))
    assert torch.allclose(cosines[0], cosines[1], atol=1e-5)
    one, other = pipe.embed_text(PROMPTS).split(1)
    turned = text_diff(embeds, one, other, 0.3)
    assert torch.allclose(turned.norm(dim=1), embeds.norm(dim=1))
    towards = torch.nn.functional.normalize(other) - torch.nn.functional.normalize(one)
    nearer = torch.nn.functional.cosine_similarity(turned, towards)
    assert bool((nearer > torch.nn.functional.cosine_similarity(embeds, towards) + 0.1).all())
    assert apart(text_diff(embeds, one, other, 0.0), embeds) <= 1e-5


def test_principal_components_of_embeddings() -> None:
    # Of three directions, by spread 9, 4 and 1, in a space of five, around a mean.
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator()))[0][:3]
    sides = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]])
    middle = torch.arange(5.0)
    among = middle + torch.cat([sides, -sides]) @ basis
    seen = middle + torch.tensor([[1.0, -2.0, 0.5]]) @ basis
    for count in range(4):
        kept = torch.tensor([[1.0, -2.0, 0.5]]) * (torch.arange(3) < count)
        assert torch.allclose(principal(seen, among, count), middle + kept @ basis, atol=1e-5)
    with pytest.raises(ValueError, match="6 components of 6 embeddings of 5"):
        principal(seen, among, 6)


def test_folders_go_both_ways(whole, tmp_path):
    pipe = ours(whole)
    pipe.save_pretrained(tmp_path / "whole")
    index = json.loads((tmp_path / "whole" / "model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPPipeline"
    assert index["prior"][1] == "PriorTransformer"
    text = StableUnCLIPPipeline.from_pretrained(tmp_path / "whole", use_safetensors=True)
    varies = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "whole")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert again.family.name == "unclip" and again.sampling_defaults.num_inference_steps == 20
    mine = drawn(quiet(again), PROMPTS, **OF_PRIOR)
    assert apart(drawn(aligned(text), PROMPTS, **OF_PRIOR), mine) <= 1e-4
    assert apart(drawn(pipe, PROMPTS, **OF_PRIOR), mine) <= 1e-4
    variation = drawn(again, image=picture())
    assert apart(drawn(quiet(varies), image=picture()), variation) <= 1e-4
    # The decoder alone, as stock saves it.
    varies.save_pretrained(tmp_path / "decoder")
    alone = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "decoder"))
    assert alone.prior is None and apart(drawn(alone, image=picture()), variation) <= 1e-4
    alone.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPImg2ImgPipeline" and "prior" not in index


def test_what_cannot_be_is_told_in_one_line(whole):
    decoder = {name: part for name, part in whole.items() if not name.startswith("prior")}
    width = tiny_unclip.WIDTH
    for parts, wrong, message in (
        (decoder, {}, "image: this decoder draws of pictures: pass one, or image_embeds"),
        (whole, {"image": picture(), "image_embeds": torch.zeros(1, width)}, "pass either image"),
        (whole, {"image_embeds": torch.zeros(1, 3)}, f"image_embeds must be a tensor n {width}"),
        (whole, {"image_embeds": torch.full((1, width), torch.nan)}, "image_embeds hold nan"),
        (whole, {"image_embeds": torch.zeros(3, width)}, "image_embeds: 3 pictures for 2 prompts"),
        (whole, {"image": picture(), "prior_guidance_scale": 2.0}, "prior_guidance_scale is of"),
        (whole, {"image": picture(), "noise_level": 1000}, r"noise_level must be .*0\.\.999"),
        (whole, {"image": picture(), "strength": 0.5}, "strength edits a .* this model varies"),
        (whole, {"image": "a.png"}, "image must be a PIL image, an array"),
        (whole, {"image": torch.zeros(3, 8, 8)}, "a tensor is what .* n 3 16 16"),
        (whole, {"prior_latents": torch.zeros(1, 2)}, r"prior_latents have .*, not \(2, "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            drawn(ours(parts), PROMPTS, **wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no prior, whose text encoder makes"):
        ours(decoder).embed_text("a")
    Cascade([ours(whole)])  # it may begin one
    with pytest.raises(ValueError, match="stage 2 of the cascade enlarges no picture"):
        Cascade([ours(whole), ours(whole)])
