"""Prompts as stock's pipelines take them: embeddings, a text for each tower, layers skipped, and
LoRAs at a scale of the call; four families.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from ldm.formats import lora
from ldm.models.lora import attach, collect
from ldm.pipeline import LatentDiffusionPipeline
from loras import shake
from stock import quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["a red apple", "two dogs"]
OTHERS = ["a painting", "a long road"]
SIZE = 16


def made(family: str) -> tuple[Any, Any]:
    """Ours and stock's over the same networks."""
    if family == "sd":
        parts: dict[str, Any] = tiny.components()
        more = {"safety_checker": None, "feature_extractor": None}
        theirs = StableDiffusionPipeline(**parts, **more, requires_safety_checker=False)
        return quiet(LatentDiffusionPipeline(**parts)), quiet(theirs)
    if family == "sdxl":
        parts = tiny_sdxl.components(published=False)
        theirs = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        return quiet(LatentDiffusionPipeline(**parts)), quiet(theirs)
    source, cls = {
        "sd3": (tiny_sd3, StableDiffusion3Pipeline), "flux": (tiny_flux, FluxPipeline)
    }[family]  # fmt: skip
    parts = source.components()
    return quiet(LatentDiffusionPipeline(**parts, unet=None)), quiet(cls(**parts))


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    return {family: made(family) for family in ("sd", "sdxl", "sd3", "flux")}


def drawn(pipe: Any, **asked: Any) -> Tensor:
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    call["guidance_scale"] = 4.0
    call |= {"height": SIZE, "width": SIZE, "generator": torch.Generator().manual_seed(0), **asked}
    ours = isinstance(pipe, LatentDiffusionPipeline)
    if not ours and isinstance(pipe, (StableDiffusion3Pipeline, FluxPipeline)):
        call["max_sequence_length"] = tiny_sd3.LENGTH
    images = pipe(**call).images
    if isinstance(pipe, FluxPipeline):
        return FluxPipeline._unpack_latents(images, SIZE, SIZE, 2)
    return images


def same(pair: tuple[Any, Any], **asked: Any) -> Tensor:
    """What both draw."""
    ours, theirs = (drawn(pipe, **asked) for pipe in pair)
    assert theirs.std() > 0.1 and float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-6
    return ours


def embeds(pair: tuple[Any, Any], count: int) -> dict[str, Tensor]:
    """Random ones, as they are passed."""
    ours = pair[0]
    said, draw = ours.conditioner.encode([""] * count), torch.Generator().manual_seed(3)
    found = {}
    for no in ("", "negative_"):
        for name, x in (("prompt_embeds", said.tokens), ("pooled_prompt_embeds", said.pooled)):
            if name == "prompt_embeds" or ours.family.pooled:
                found[no + name] = torch.randn(x.shape, generator=draw)
    return found


TRUE = {"flux": {"true_cfg_scale": 3.0}}
FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_stock(pairs, family):
    pair, true = pairs[family], TRUE.get(family, {})
    both = embeds(pair, 2)
    positive = {name: x for name, x in both.items() if not name.startswith("negative")}
    negative = {name: x for name, x in both.items() if name.startswith("negative")}
    whole = same(pair, **both, **true)
    if family in ("sd", "sdxl"):  # the others' stock repeats texts alone
        more = same(pair, **both, **true, num_images_per_prompt=2)
        assert more.shape[0] == 4 and not torch.equal(more[0], more[1])
    words = same(pair, **positive, **true, negative_prompt=["blurred", ""])
    plain = same(pair, **positive, **true)
    against = same(pair, prompt=PROMPTS, **negative, **true)
    found = [whole, words, plain, against]
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(found) for b in found[:n])
    ours = drawn(pair[0], **both, **true, seed=4, generator=None)
    split = drawn(pair[0], **both, **true, seed=4, generator=None, batch_size=1)
    assert (ours - split).abs().max() < 1e-4
    # What a text says, passed as its embeddings, is that text.
    with torch.no_grad():
        said = pair[0].conditioner.encode(PROMPTS)
    given = {"prompt_embeds": said.tokens}
    given |= {"pooled_prompt_embeds": said.pooled} if pair[0].family.pooled else {}
    assert torch.equal(drawn(pair[0], **given), drawn(pair[0], prompt=PROMPTS))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_text_for_each_tower_as_in_stock(pairs, family):
    pair, true = pairs[family], TRUE.get(family, {})
    plain = same(pair, prompt=PROMPTS, negative_prompt=["", "blue"], **true)
    calls: list[dict[str, Any]] = [{"prompt_2": OTHERS}, {"negative_prompt_2": OTHERS}]
    if family == "sd3":
        calls += [{"prompt_3": OTHERS}, {"negative_prompt_3": OTHERS, "prompt_2": PROMPTS}]
    for call in calls:
        found = same(pair, prompt=PROMPTS, negative_prompt=["", "blue"], **true, **call)
        assert (found - plain).abs().max() > 1e-3
    none = same(pair, prompt=PROMPTS, negative_prompt=["", "blue"], prompt_2="", **true)
    assert torch.equal(none, plain)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_layers_skipped_are_those_of_stock(pairs, family):
    pair = pairs[family]
    if family == "sd":  # whose stock looks for the norm where older transformers had it
        vars(pair[1].text_encoder)["text_model"] = pair[1].text_encoder
    ask: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": ["blurred", ""]}
    plain = same(pair, **ask)
    assert torch.equal(same(pair, **ask, clip_skip=0), plain)
    assert (same(pair, **ask, clip_skip=1) - plain).abs().max() > 1e-3
    most = 2 if family == "sd" else 1  # of the tower with fewer layers
    with pytest.raises(ValueError, match=rf"clip_skip must lie in 0\.\.{most}, as text_encoder"):
        drawn(pair[0], **ask, clip_skip=3)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_loras_at_a_scale_of_the_call(tmp_path, family):
    pair = made(family)
    ours, theirs = pair
    part = ours.family.network
    adapted = made(family)[0].components[part]
    attach(adapted, ["to_q", "to_v"], rank=2, alpha=2.0, dora=False)
    shake(adapted)
    lora.write({part: collect(adapted)}, tmp_path / "a.safetensors")
    bare = drawn(ours, prompt=PROMPTS)
    ours.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    key = "cross_attention_kwargs" if family == "sd" else "joint_attention_kwargs"
    whole = same(pair, prompt=PROMPTS)
    half = same(pair, prompt=PROMPTS, **{key: {"scale": 0.5}})
    assert (half - whole).abs().max() > 1e-3
    assert torch.equal(same(pair, prompt=PROMPTS), whole)  # a call changes nothing
    assert torch.equal(drawn(ours, prompt=PROMPTS, **{key: {"scale": 0.0}}), bare)
    with pytest.raises(ValueError, match=r'attention_kwargs takes \{"scale": strength'):
        drawn(ours, prompt=PROMPTS, **{key: {"gligen": {}}})
    with pytest.raises(ValueError, match="scale of .* must be a finite number, not 'much'"):
        drawn(ours, prompt=PROMPTS, **{key: {"scale": "much"}})


def test_what_does_not_fit_is_one_clear_line(pairs):
    rows = torch.zeros(2, tiny.LENGTH, tiny.WIDTH)
    sd, sdxl, sd3, flux = (pairs[family][0] for family in FAMILIES)
    wide, pooled = embeds(pairs["sdxl"], 2)["prompt_embeds"], torch.zeros(2, tiny_sdxl.PROJECTION)
    for pipe, call, told in (
        (sd, {"prompt": "a", "prompt_embeds": rows}, "pass either prompt or prompt_embeds"),
        (sd, {"prompt_embeds": rows, "negative_prompt": ["a"] * 3}, "negative_prompt has 3 texts"),
        (sd, {"prompt_embeds": rows[0]}, "prompt_embeds must be a tensor of floating-point"),
        (sd, {"prompt_embeds": "red"}, "prompt_embeds must be a tensor of .* not 'red'"),
        (sd, {"prompt_embeds": rows[..., :7]}, r"prompt_embeds of shape \(2, 24, 7\)"),
        (sd, {"prompt_embeds": rows[:, :9]}, "the prompts are 9 tokens and the negative prompts"),
        (sd, {"prompt_embeds": rows, "negative_prompt_embeds": rows[:, :9]}, "prompts are 24"),
        (sd, {"prompt": "a", "negative_prompt_embeds": rows}, "negative_prompt has 2 texts for 1"),
        (sd, {"prompt": "a", "prompt_2": "b"}, "prompt_2 is no argument of a model of .* sd"),
        (sd, {"prompt": "a", "pooled_prompt_embeds": rows}, "pooled_prompt_embeds is no argument"),
        (sd, {"prompt": "a", "clip_skip": -1}, r"clip_skip must lie in 0\.\.2"),
        (sd, {"prompt": "a", "clip_skip": 1.5}, "clip_skip must be a whole number"),
        (sdxl, {"prompt_embeds": wide}, "prompt_embeds needs pooled_prompt_embeds beside it"),
        (sdxl, {"prompt": "a", "pooled_prompt_embeds": pooled}, "needs prompt_embeds beside it"),
        (sdxl, {"prompt": "a", "prompt_2": ["b", "c", "d"]}, "prompt_2 has 3 texts for 1"),
        (sdxl, {"prompt": "a", "prompt_2": 3}, "prompt_2 must be a text or a list of texts"),
        (sdxl, {"prompt_embeds": wide, "prompt_2": "b"}, "pass either prompt or prompt_embeds"),
        (sd3, {"prompt": "a", "negative_prompt_2": "\0"}, "negative_prompt_2 .* NUL"),
        (flux, {"prompt": "a", "clip_skip": 1}, "clip_skip is no argument of .* family flux"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            drawn(pipe, **{"num_inference_steps": 1, **call})
    alone = quiet(LatentDiffusionPipeline(**tiny_sdxl.components(refiner=True)))
    with pytest.raises(ValueError, match="prompt_2: there is no further text encoder to read it"):
        drawn(alone, prompt="a", prompt_2="b")
