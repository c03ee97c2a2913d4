"""SD3: our latents are stock's, whichever flow scheduler, size or towers; folders go both ways."""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

import tiny_sd3
from ldm.pipeline import LatentDiffusionPipeline
from stock import quiet
from turns import turns

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["a red apple", "two dogs"]
SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 20}
SCHEDULERS: dict[str, Any] = {
    "shift 3": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
    "by size": FlowMatchEulerDiscreteScheduler(**SHIFTED),
}


def stock(parts: dict[str, Any], scheduler: Any) -> Any:
    again = type(scheduler).from_config(scheduler.config)
    return quiet(StableDiffusion3Pipeline(**parts | {"scheduler": again}))


def ours(parts: dict[str, Any], scheduler: Any) -> LatentDiffusionPipeline:
    again = type(scheduler).from_config(scheduler.config)
    return quiet(LatentDiffusionPipeline(**parts | {"scheduler": again, "unet": None}))


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny_sd3.components()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
CLOSE = 5e-6
"""We read the empty text once, stock beside its like: the towers round it otherwise. Told its
embeddings nothing is apart.
"""
EMBEDS = [f"{no}{pooled}prompt_embeds" for pooled in ("", "pooled_") for no in ("", "negative_")]
OURS: dict[str, dict[str, Any]] = {
    "no negative": {},
    "negative, 12 x 16": {"negative_prompt": ["blurred", ""], "height": 12, "width": 16},
    "two images a prompt, 16 x 8": {"num_images_per_prompt": 2, "height": 16, "width": 8},
}


@pytest.mark.parametrize(("name", "call"), turns(SCHEDULERS, OURS))
def test_latents_are_those_of_stock(parts, name, call):
    asked = {"prompt": PROMPTS, **CALL, **OURS[call]}
    theirs = stock(parts, SCHEDULERS[name])(
        generator=generator(), max_sequence_length=tiny_sd3.LENGTH, **asked
    ).images
    mine = ours(parts, SCHEDULERS[name])(generator=generator(), **asked).images
    assert theirs.std() > 0.1 and apart(mine, theirs) <= CLOSE


def test_the_shift_goes_by_the_size(parts):
    def draw(scheduler: Any, width: int) -> Tensor:
        pipe = ours(parts, scheduler)
        return pipe("two dogs", generator=generator(), height=16, width=width, **CALL).images

    for width, tokens in ((8, 8), (16, 16)):
        mu = 0.5 + 0.65 * (tokens - 4) / 16
        fixed = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=mu, max_shift=mu
        )
        by_size = draw(SCHEDULERS["by size"], width)
        assert apart(draw(fixed, width), by_size) < 1e-6
        assert apart(draw(FlowMatchEulerDiscreteScheduler(), width), by_size) > 1e-3


@pytest.mark.parametrize("length", [None, tiny_sd3.LENGTH], ids=["256", "20"])
def test_without_the_t5_zeros_stand_for_it(parts, length):
    alone = parts | {"text_encoder_3": None, "tokenizer_3": None}
    asked = {"prompt": PROMPTS, **CALL} | ({"max_sequence_length": length} if length else {})
    scheduler = SCHEDULERS["shift 3"]
    theirs = stock(alone, scheduler)(generator=generator(), **asked).images
    mine = ours(alone, scheduler)(generator=generator(), **asked).images
    assert apart(mine, theirs) <= CLOSE
    tokens = {"max_sequence_length": length} if length else {}
    with torch.no_grad():
        said = stock(alone, scheduler).encode_prompt(PROMPTS, None, None, **tokens)
    told = CALL | dict(zip(EMBEDS, said, strict=True))
    assert apart(ours(alone, scheduler)(generator=generator(), **told).images, theirs) <= 1e-7
    assert apart(ours(parts, scheduler)(generator=generator(), **asked).images, theirs) > 1e-3


# Fewer tokens than a text has, and more than the tokenizer says that it reads.
@pytest.mark.parametrize("length", [2, 5, 40])
def test_the_t5_reads_as_many_tokens_as_are_asked_for(parts, length):
    asked = {"prompt": PROMPTS, "negative_prompt": "blurred", "max_sequence_length": length, **CALL}
    scheduler, drawn = SCHEDULERS["shift 3"], []
    for make in (stock, ours):
        drawn.append(make(parts, scheduler)(generator=generator(), **asked).images)
    assert apart(*drawn) <= 1e-6
    pipe, usual = ours(parts, scheduler), {"prompt": PROMPTS, "negative_prompt": "blurred", **CALL}
    assert apart(pipe(generator=generator(), **usual).images, drawn[0]) > 1e-3
    assert pipe.conditioner.towers["text_encoder_3"].length == tiny_sd3.LENGTH
    weighted = pipe(generator=generator(), prompt_syntax="a1111", **asked).images
    assert apart(weighted, drawn[0]) <= 1e-6


def test_a_folder_is_opened_without_its_t5(tmp_path, parts):
    ours(parts, SCHEDULERS["shift 3"]).save_pretrained(tmp_path)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    asked = {"prompt": PROMPTS, "max_sequence_length": tiny_sd3.LENGTH, **CALL}
    theirs = quiet(StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent))
    shutil.rmtree(tmp_path / "text_encoder_3")  # nobody has to have it
    mine = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path, **absent))
    assert mine.text_encoder_3 is None and [*mine.conditioner.towers][1:] == ["text_encoder_2"]
    drawn = theirs(generator=generator(), **asked).images
    assert apart(mine(generator=generator(), **asked).images, drawn) <= 1e-6


@pytest.mark.parametrize(
    ("late", "half"),
    [(True, False), (True, True), (False, True)],
    ids=["float32", "float16", "float16, no t5"],
)
def test_folders_go_both_ways(tmp_path, late, half):
    pipe = ours(tiny_sd3.components(late=late), SCHEDULERS["by size"])
    if half:
        pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path / "ours", variant="fp16" if half else None)
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert not {"unet", "safety_checker", "classes", "force_zeros_for_empty_prompt"} & set(index)
    variant = "fp16" if half else None
    absent = {} if late else {"text_encoder_3": None, "tokenizer_3": None}  # stock wants it said
    theirs = quiet(
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours", variant=variant, **absent)
    )
    assert theirs.transformer.dtype == theirs.text_encoder.dtype == torch.float32
    if late:
        assert theirs.text_encoder_3.dtype == torch.float32
    longest = {"max_sequence_length": tiny_sd3.LENGTH} if late else {}
    call = {"prompt": "a red apple", **CALL}
    drawn = theirs(generator=generator(), **call, **longest).images
    mine = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "ours", variant=variant))
    assert apart(mine(generator=generator(), **call).images, drawn) <= 1e-6
    if half:
        theirs.to(torch.float16)
    theirs.save_pretrained(tmp_path / "theirs", variant=variant)
    again = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs", variant=variant))
    assert again.family.name == "sd3" and again.sampling_defaults.sampler == "flow-euler"
    assert apart(again(generator=generator(), **call).images, drawn) <= 1e-6
    if half and not late:
        low = LatentDiffusionPipeline.from_pretrained(
            tmp_path / "ours", variant=variant, dtype=torch.float16
        )
        here = quiet(low)(generator=generator(), **call).images
        assert here.dtype == torch.float16 and apart(here.float(), drawn) < 0.05


def test_pictures_and_what_is_refused(parts):
    pipe = ours(parts, SCHEDULERS["shift 3"])
    images = pipe("a red apple", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and bool(images.isfinite().all())
    for wrong, message in (
        ({"height": 18}, "height must be a multiple of 4 pixels, not 18"),
        ({"original_size": (16, 16)}, "original_size is no argument of a model of the family sd3"),
        ({"sampler": "dpm++"}, "use one of flow-euler, flow-heun"),
        ({"max_sequence_length": 513}, "max_sequence_length must be at most 512, not 513"),
        ({"max_sequence_length": 1}, "max_sequence_length must be at least 2, not 1"),
        ({"max_sequence_length": "long"}, "max_sequence_length must be a whole number, not 'long'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a red apple", num_inference_steps=2, **wrong)
