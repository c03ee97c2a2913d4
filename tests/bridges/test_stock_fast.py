"""What diffusers' fast tests ask of ``StableDiffusionPipeline``, asked of ours: those that no other
test here asks already. README.md has them all.
"""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    LMSDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SD3CFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.schedulers import AysSchedules
from peft import LoraConfig
from torch import Tensor

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from ldm.pipeline import LatentDiffusionPipeline
from loras import shake
from stock import quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
TEXT = ("text_encoder", "tokenizer")


def pair_of(parts: dict[str, Any], kind: type | None = None) -> tuple[Any, Any]:
    """Ours and stock's over the same networks."""
    own = [parts | {"scheduler": (kind or DDIMScheduler).from_config(parts["scheduler"].config)}
           for _ in range(2)]  # fmt: skip
    return quiet(LatentDiffusionPipeline(**own[0])), quiet(
        StableDiffusionPipeline(**own[1], **NONE)
    )


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny.components()


@pytest.fixture
def pair(parts: dict[str, Any]) -> tuple[Any, Any]:
    return pair_of(parts)


def drawn(pipe: Any, **asked: Any) -> Tensor:
    call: dict[str, Any] = {"prompt": "a red heart", "num_inference_steps": 2, "output_type": "pt",
                            "generator": torch.Generator().manual_seed(0)}  # fmt: skip
    return pipe(**call | asked).images


def same(pair: tuple[Any, Any], **asked: Any) -> Tensor:
    """What both draw, which must be the same to the last bit."""
    calls = [{k: v() if callable(v) and k == "generator" else v for k, v in asked.items()}
             for _ in pair]  # fmt: skip
    ours, theirs = (drawn(pipe, **call) for pipe, call in zip(pair, calls, strict=True))
    assert torch.equal(ours, theirs) and float(ours.float().std()) > 0.01
    return ours


# --- prompts --------------------------------------------------------------------------------------


LENGTH = {"max_sequence_length": tiny_sd3.LENGTH}  # as long as stock's T5 is told
FAMILIES = {
    "sd": (tiny.components, StableDiffusionPipeline, {}),
    "sdxl": (lambda: tiny_sdxl.components(published=False), StableDiffusionXLPipeline, {}),
    "sd3": (tiny_sd3.components, StableDiffusion3Pipeline, LENGTH),
    "flux": (tiny_flux.components, FluxPipeline, LENGTH),
}  # fmt: skip


def of_family(name: str) -> tuple[Any, Any, dict[str, Any]]:
    make, cls, told = FAMILIES[name]
    parts = make()
    more = {"sd": NONE, "sdxl": {"add_watermarker": False}}.get(name, {})
    ours = LatentDiffusionPipeline(**parts | ({} if "unet" in parts else {"unet": None}))
    return quiet(ours), quiet(cls(**parts, **more)), told


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_prompt_is_that_of_stock_and_needs_no_other_part(family: str) -> None:
    ours, theirs, length = of_family(family)
    flux = family == "flux"
    asked: dict[str, Any] = {"prompt": ["a red heart", "two dogs"], "num_images_per_prompt": 2}
    if not flux:
        asked |= {"negative_prompt": ["blue", ""], "do_classifier_free_guidance": True}
    if family != "sd":
        asked |= {"prompt_2": ["a", "b"]}
    if family == "sd3":
        asked |= {"prompt_3": ["c", "d"]}
    with torch.no_grad():
        expected = theirs.encode_prompt(**asked, device="cpu", **length)
        found = ours.encode_prompt(**asked)
        again = ours.encode_prompt(**asked | {"device": torch.device("cpu")})
    assert len(found) == len(expected) == len(ours.family.encoded)
    for name, one, two, three in zip(ours.family.encoded, found, expected, again, strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype, name
        assert torch.allclose(one, two, atol=1e-6) and torch.equal(one, three), name
    # In two halves: what reads texts, and what draws without it.
    text = {n: p for n, p in ours.components.items() if "text_enc" in n or "tokenizer" in n}
    rest = {n: p for n, p in ours.components.items() if n not in text}
    absent = {"vae": None, "unet": None, "scheduler": None}
    reads = LatentDiffusionPipeline(**absent, **{n: p for n, p in text.items() if p is not None})
    draws = quiet(LatentDiffusionPipeline(**rest, text_encoder=None, tokenizer=None))
    assert (reads.family.name, draws.family.name) == (family, family)
    call: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16}
    said = dict(zip(ours.family.encoded, reads.encode_prompt("a red heart"), strict=True))
    said.pop("text_ids", None)
    found, expected = drawn(draws, prompt=None, **call, **said), drawn(ours, **call)
    assert torch.allclose(found, expected, atol=1e-5)
    if not flux:
        draws.register_to_config(force_zeros_for_empty_prompt=False)
        with pytest.raises(ValueError, match="^without a text encoder pass prompt_embeds"):
            half = {name: x for name, x in said.items() if not name.startswith("negative")}
            drawn(draws, prompt=None, **call, **half)
    with pytest.raises(ValueError, match="^without a text encoder pass prompt_embeds"):
        drawn(draws, **call)


def test_encode_prompt_of_stable_diffusion(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Positions, embeddings that come back, layers, and a text that is too long."""
    ours, theirs = pair
    long = "heart " * 20
    for asked in ((long, "cpu", 1, True, None), (long, "cpu", 1, True, "x"),
                  ("a", "cpu", 2, False)):  # fmt: skip
        found, expected = (pipe.encode_prompt(*asked) for pipe in (ours, theirs))
        for one, two in zip(found, expected, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    cut = [r.getMessage() for r in caplog.records if "is longer than 24 tokens" in r.getMessage()]
    assert cut
    with torch.no_grad():
        said, null = ours.encode_prompt("a", "cpu", 1, True, clip_skip=1)
        assert not torch.equal(said, ours.encode_prompt("a", "cpu")[0])
    told = {"prompt_embeds": said, "negative_prompt_embeds": null}
    assert torch.equal(drawn(ours, prompt=None, **told), drawn(ours, prompt="a", clip_skip=1))
    back = ours.encode_prompt(None, "cpu", 1, True, **told)
    assert torch.equal(back[0], said) and torch.equal(back[1], null)
    weighted, _ = ours.encode_prompt("a (heart:1.5)", "cpu", prompt_syntax="a1111")
    assert weighted.shape == said.shape
    for wrong, told in (
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": "a", "device": "there"}, "device must be a device, not 'there'"),
        ({"prompt": "a", "prompt_2": "b"}, "prompt_2 is no argument of encode_prompt"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "negative_prompt has 3 texts"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            ours.encode_prompt(**wrong)
        assert "\n" not in str(error.value)


# --- steps and callbacks --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LMSDiscreteScheduler, LCMScheduler])
def test_schedulers_and_their_own_steps(parts: dict[str, Any], kind: type) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        heard = {"time_cond_proj_dim": 16} if kind is LCMScheduler else {}
        unet = UNet2DConditionModel.from_config({**tiny.unet().config, **heard}).eval()
    pair = pair_of(parts | {"unet": unet}, kind)
    plain = same(pair, generator=lambda: torch.Generator().manual_seed(0))
    if kind is LCMScheduler:
        own = {"num_inference_steps": None, "timesteps": [999, 499]}
        seeded = {"generator": lambda: torch.Generator().manual_seed(0)}
        assert torch.equal(same(pair, **own, **seeded), plain)


def test_align_your_steps(parts: dict[str, Any]) -> None:
    pair = pair_of(parts, EulerDiscreteScheduler)
    noise = {"latents": torch.randn(1, *tiny.LATENT, generator=torch.Generator().manual_seed(1))}
    own = [same(pair, **noise, **{"num_inference_steps": None, name: AysSchedules[key]})
           for name, key in (("timesteps", "StableDiffusionTimesteps"),
                             ("sigmas", "StableDiffusionSigmas"))]  # fmt: skip
    assert float((own[0] - own[1]).abs().max()) < 1e-3
    assert float((own[0] - same(pair, **noise, num_inference_steps=10)).abs().max()) > 1e-3


def test_names_of_a_call_after_it(pair: Any) -> None:
    """They are those of the last call of a thread; before one there are none, as in stock."""
    ours, _ = pair
    with pytest.raises(AttributeError, match="guidance_scale"):
        _ = ours.guidance_scale

    def more(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        pipe._guidance_scale += 1.0
        return tensors

    names = ours._callback_tensor_inputs
    assert names == StableDiffusionPipeline._callback_tensor_inputs
    same(pair, guidance_scale=2.0, callback_on_step_end=more,
         callback_on_step_end_tensor_inputs=names,
         generator=lambda: torch.Generator().manual_seed(0))  # fmt: skip
    for pipe in pair:
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 4.0
        assert pipe.do_classifier_free_guidance and pipe.interrupt is False
    zeros = drawn(ours, output_type="latent", callback_on_step_end_tensor_inputs=names,
                  callback_on_step_end=lambda pipe, step, t, told: {
                      "latents": torch.zeros_like(told["latents"])
                      if step == pipe.num_timesteps - 1 else told["latents"]})  # fmt: skip
    assert float(zeros.abs().sum()) == 0


@pytest.mark.parametrize(
    ("family", "cut"), [("sdxl", SDXLCFGCutoffCallback), ("sd3", SD3CFGCutoffCallback)]
)
def test_official_callbacks_end_guidance_as_in_stock(family: str, cut: type) -> None:
    ours, theirs, length = of_family(family)
    call: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16,
                            "guidance_scale": 5.0, "output_type": "latent"}  # fmt: skip
    whole = drawn(ours, **call)
    call["callback_on_step_end"] = cut(cutoff_step_index=0, cutoff_step_ratio=None)
    found, expected = drawn(ours, **call), drawn(theirs, **call, **length)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.equal(found, whole)
    assert set(theirs._callback_tensor_inputs) <= set(ours._callback_tensor_inputs)
    with pytest.raises(ValueError, match="only latents, prompt_embeds, .* can be passed, not"):
        drawn(ours, **call | {"callback_on_step_end": lambda *_: {}},
              callback_on_step_end_tensor_inputs=["time"])  # fmt: skip


@pytest.mark.parametrize("name", ["IPNDMScheduler", "CMStochasticIterativeScheduler"])
def test_schedulers_of_other_processes_are_refused(parts: dict[str, Any], name: str) -> None:
    """IPNDM's levels are those of no table that a model states, and consistency models' begin at
    80; EDM's are of folders whose process is that (``tests/laws``).
    """
    pipe = pair_of(parts)[0]
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=name) as error:
        drawn(pipe)
    assert "\n" not in str(error.value)


# --- methods beside the call ----------------------------------------------------------------------


def test_the_signature_is_that_of_stock() -> None:
    for name in ("encode_prompt", "check_inputs", "prepare_latents", "run_safety_checker"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters
                        for cls in (LatentDiffusionPipeline, StableDiffusionPipeline))  # fmt: skip
        assert [*ours][: len(theirs)] == [*theirs], name


def test_latents_inputs_and_safety_are_stocks(pair: Any) -> None:
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        for pipe in pair:
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        kind_of = (torch.float32, torch.device("cpu"))
        made = [pipe.prepare_latents(2, 4, 16, 24, *kind_of, torch.Generator().manual_seed(3))
                for pipe in pair]  # fmt: skip
        assert made[0].shape == (2, 4, 8, 12) and torch.equal(*made)
    assert pair[0].vae_scale_factor == pair[1].vae_scale_factor == 2
    ours = pair[0]
    ours.check_inputs("a", 16, 16)
    ours.check_inputs(None, None, None, prompt_embeds=torch.zeros(1, 24, 32))
    for wrong in (("a", 17, 16), ("a", 16, 16, 1), (3, 16, 16), ("a", 16, 16, None, ["b", "c"]),
                  ("a", 16, 16, None, None, torch.zeros(1, 24, 32)), (None, 16, 16),
                  ("a", 16, 16, None, None, None, None, None, None, ["time"])):  # fmt: skip
        with pytest.raises(ValueError) as error:
            ours.check_inputs(*wrong)
        assert "\n" not in str(error.value)
    pixels = torch.zeros(1, 3, 4, 4)
    for pipe in pair:
        shown, flags = pipe.run_safety_checker(pixels, torch.device("cpu"), torch.float32)
        assert shown is pixels and flags is None


def test_sizes_that_a_network_states(parts: dict[str, Any]) -> None:
    sizes = dict(parts["unet"].config) | {"sample_size": [8, 12]}
    unet = UNet2DConditionModel.from_config(sizes).eval()
    assert same(pair_of(parts | {"unet": unet}), generator=lambda: torch.Generator().manual_seed(0)
                ).shape == (1, 3, 16, 24)  # fmt: skip


def test_fused_projections_and_layerwise_casting() -> None:
    pair = pair_of(tiny.components())
    seeded = {"generator": lambda: torch.Generator().manual_seed(0)}
    plain = same(pair, **seeded)
    pair[0].fuse_qkv_projections()
    assert float((same(pair, **seeded) - plain).abs().max()) < 1e-5
    pair[0].unfuse_qkv_projections()
    assert float((same(pair, **seeded) - plain).abs().max()) < 1e-5
    pair[0].unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    cast = drawn(pair[0])
    assert bool(cast.isfinite().all()) and 0 < float((cast - plain).abs().max()) < 0.5


def test_from_one_pipeline_to_another(pair: Any) -> None:
    ours, theirs = pair
    seeded = {"generator": lambda: torch.Generator().manual_seed(0)}
    plain = same(pair, **seeded)
    taken = quiet(LatentDiffusionPipeline.from_pipe(theirs))
    assert taken.unet is theirs.unet and torch.equal(drawn(taken), plain)
    edits = quiet(StableDiffusionImg2ImgPipeline.from_pipe(ours))
    call = {"image": np.zeros((1, 16, 16, 3), np.float32), "strength": 0.5,
            "num_inference_steps": 4}  # fmt: skip
    found = [drawn(pipe, **call) for pipe in (ours, edits)]
    assert torch.allclose(*found, atol=1e-5)


def test_dtypes_by_part(tmp_path: Any) -> None:
    folder = tiny.folder(tmp_path / "model")
    asked = {"unet": torch.bfloat16, "default": torch.float16}
    pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=asked)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float16)
    with pytest.raises((ValueError, OSError), match="fp16") as error:
        LatentDiffusionPipeline.from_pretrained(folder, variant="fp16")
    assert "\n" not in str(error.value)


# --- LoRA weights of blocks -----------------------------------------------------------------------


BLOCKS = [
    {"text_encoder": 2.0, "unet": {"down": 5.0}},
    {"unet": {"up": {"block_1": [1.0, 0.0]}, "mid": 3.0}},
    {"unet": {"down": {"block_0": 0.5}, "mid": 0.0, "up": 0.25}},
    0.5,
]  # fmt: skip


def test_weights_of_blocks_are_those_of_stock() -> None:
    pair = pair_of(tiny.components())
    ours, theirs = pair
    seeded = {"generator": lambda: torch.Generator().manual_seed(0)}
    plain = same(pair, **seeded)
    for name in ("a", "b"):
        for part, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
            network = getattr(ours, part)
            network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), name)
            shake(network)
    seen = [plain]
    for weights in BLOCKS:
        ours.set_adapters("a", weights)
        scales = {n: dict(m.scaling) for n, m in ours.unet.named_modules() if hasattr(m, "scaling")}
        theirs.set_adapters("a", weights)
        assert scales == {n: dict(m.scaling) for n, m in theirs.unet.named_modules()
                          if hasattr(m, "scaling")}  # fmt: skip
        seen.append(same(pair, **seeded))
    ours.set_adapters(["a", "b"], BLOCKS[:2])
    seen.append(same(pair, **seeded))
    assert all(not torch.equal(one, two) for n, one in enumerate(seen) for two in seen[:n])
    with pytest.raises(ValueError):
        ours.set_adapters(["a", "b"], BLOCKS[:1])
    with pytest.raises(ValueError, match="block_0"):
        ours.set_adapters("a", {"unet": {"down": {"block_0": [1.0, 1.0, 1.0]}}})
    ours.set_adapters("a", 0.5)
    half = same(pair, **seeded)
    ours.set_adapters("a")
    scaled = same(pair, **seeded, cross_attention_kwargs={"scale": 0.5})
    assert torch.allclose(scaled, half, atol=1e-5)
    names = {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    assert ours.get_list_adapters() == names and ours.get_active_adapters() == ["a"]
    with pytest.raises(ValueError, match="'c'"):
        ours.set_adapters(["a", "c"])
    ours.disable_lora()
    assert torch.allclose(same(pair, **seeded), plain, atol=1e-6)
    ours.enable_lora()
    ours.delete_adapters("a")
    assert ours.get_list_adapters() == {"unet": ["b"], "text_encoder": ["b"]}
