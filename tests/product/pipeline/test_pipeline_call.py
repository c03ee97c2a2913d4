"""What a user of the pipeline and of ``ldm sample`` meets."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner

import tiny
import tiny_flux
from ldm.cli import app
from ldm.data.folder import FolderData
from ldm.diffusion import Prediction, Target, predictor
from ldm.formats import lora, textual_inversion
from ldm.formats.png import Parameters, read_parameters, write_picture
from ldm.guidance import ClassifierFree, LinearInverse
from ldm.guidance.operators import super_resolution
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import TextConditioner
from ldm.models.lora import attach, collect, weights
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import PROCESS_SAMPLERS, SAMPLERS
from turns import turns

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
STEPS = 4
NAN = float("nan")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def draw(pipe: Any, prompt: Any = "a red heart", **arguments: Any) -> torch.Tensor:
    call = {"num_inference_steps": STEPS, "output_type": "pt", "seed": 0, **arguments}
    return pipe(prompt, **call).images


# The adaptive one takes its steps for the whole batch: alike to its tolerance alone.
OWN = [name for name in PROCESS_SAMPLERS if name not in ("ode-adaptive", "langevin")]


@pytest.mark.parametrize("name", [*SAMPLERS, *OWN, None])
def test_a_seed_draws_the_same_picture_at_any_batch_size(pipe: Any, name: str | None) -> None:
    prompts = ["a", "b", "c"]
    whole = draw(pipe, prompts, seed=7, num_images_per_prompt=2, sampler=name)
    assert whole.shape == (6, 3, 16, 16)
    # How six are parted is no matter of the sampler: all ways by the default and by one with noise.
    every = name in (None, "ddpm")
    for size in (1, 4, 5) if every else (4,):
        split = draw(pipe, prompts, seed=7, num_images_per_prompt=2, sampler=name, batch_size=size)
        assert float((split - whole).abs().max()) < 1e-4
    for i in range(6) if every else (0, 5):
        alone = draw(pipe, prompts[i // 2], seed=7 + i, sampler=name)
        assert float((alone[0] - whole[i]).abs().max()) < 1e-4
    assert float((whole[0] - whole[1]).abs().max()) > 0.05


plain = cache(tiny.pipeline)


@cache
def drawn_by_eps(name: str | None) -> torch.Tensor:
    return draw(plain(), sampler=name)


@pytest.mark.parametrize(("name", "speaks"), turns([*SAMPLERS, *OWN, None], ["v", "x0"]))
def test_the_same_picture_whatever_the_network_speaks(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, speaks: Target, name: str | None
) -> None:
    eps = drawn_by_eps(name)

    def said(denoiser: Any, target: Target) -> Any:
        assert target == speaks  # what the folder says of its network
        inner = predictor(denoiser, "eps")

        def predict(*asked: Any) -> Prediction:
            found = inner(*asked)
            return replace(found, y=found.as_(speaks), target=speaks)

        return predict

    monkeypatch.setattr("ldm.pipeline.predictor", said)
    kind = {"v": "v_prediction", "x0": "sample"}[speaks]
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    monkeypatch.setattr(pipe, "scheduler", other)
    assert float((draw(pipe, sampler=name) - eps).abs().max()) < 2e-3


def test_a_list_of_seeds_and_a_list_of_generators(pipe: Any) -> None:
    whole = draw(pipe, seed=[5, 3], num_images_per_prompt=2)
    assert float((whole[1] - draw(pipe, seed=3)[0]).abs().max()) < 1e-4
    draws = [torch.Generator().manual_seed(s) for s in (5, 3)]
    assert torch.equal(whole, draw(pipe, seed=None, generator=draws, num_images_per_prompt=2))


def test_the_global_generator_draws_where_nothing_is_given(pipe: Any) -> None:
    torch.manual_seed(0)
    first = draw(pipe, seed=None)
    torch.manual_seed(0)
    assert torch.equal(first, draw(pipe, seed=None))
    assert not torch.equal(first, draw(pipe, seed=None))
    state = torch.get_rng_state()
    draw(pipe, seed=0, sampler="euler-a")
    assert torch.equal(state, torch.get_rng_state())  # a seed leaves it alone


def test_output_types(pipe: Any) -> None:
    pt = draw(pipe)
    assert pt.dtype == torch.float32 and 0 <= float(pt.min()) < float(pt.max()) <= 1
    array = draw(pipe, output_type="np")
    assert isinstance(array, np.ndarray) and np.array_equal(array[0], pt[0].permute(1, 2, 0))
    (image,) = draw(pipe, output_type="pil")
    assert isinstance(image, Image.Image) and image.size == (16, 16)
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    latent = draw(pipe, output_type="latent")
    assert latent.shape == (1, *tiny.LATENT) and not latent.requires_grad
    call = {"num_inference_steps": STEPS, "seed": 0, "output_type": "pt"}
    images, flags = pipe("a red heart", **call, return_dict=False)
    assert torch.equal(images, pt) and flags is None


def test_sizes(pipe: Any) -> None:
    assert draw(pipe, height=24, width=32).shape == (1, 3, 24, 32)
    wide = torch.randn(1, 4, 8, 16)
    assert draw(pipe, latents=wide).shape == (1, 3, 16, 32)


def test_a_unet_that_states_no_size() -> None:
    pipe = tiny.pipeline()
    pipe.unet.register_to_config(sample_size=None)
    whole = draw(pipe, height=24, width=32)
    assert whole.shape == (1, 3, 24, 32)
    assert draw(pipe, latents=torch.randn(1, 4, 8, 16)).shape == (1, 3, 16, 32)
    for sides in ({}, {"height": 16}, {"width": 16}):
        told = refused(pipe, sides)
        assert told == "this U-Net states no sample_size: pass both height and width"


def test_negative_prompt_and_guidance(pipe: Any) -> None:
    plain = draw(pipe)
    assert torch.equal(plain, draw(pipe, negative_prompt=""))
    assert float((plain - draw(pipe, negative_prompt="blue")).abs().max()) > 1e-3
    same = draw(pipe, negative_prompt="a red heart", guidance_scale=7.5)
    bare = draw(pipe, guidance_scale=1.0)
    assert float((same - bare).abs().max()) < 1e-4  # y + 7.5 (y - y)
    assert torch.equal(bare, draw(pipe, guidance_scale=1.0, negative_prompt="ignored"))
    both = draw(pipe, ["a", "b"], negative_prompt=["x", "y"], seed=0)
    assert float((both[1] - draw(pipe, "b", negative_prompt="y", seed=1)[0]).abs().max()) < 1e-4


def test_guidance_costs_one_doubled_evaluation_a_step(pipe: Any) -> None:
    sizes: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    draw(pipe, ["a", "b"])
    draw(pipe, ["a", "b"], guidance_scale=1.0)
    hook.remove()
    assert sizes == [4] * STEPS + [2] * STEPS


def test_guidance_of_one_s_own(pipe: Any) -> None:
    plain = draw(pipe, negative_prompt="blue", guidance_scale=3.0, guidance_rescale=0.5)
    given = draw(pipe, negative_prompt="blue", guidance=ClassifierFree(3.0, 0.5))
    assert torch.equal(plain, given)
    codec = VaeCodec(pipe.vae)
    y = draw(pipe, seed=5, guidance_scale=1.0, output_type="latent")

    def operator(z: torch.Tensor) -> torch.Tensor:
        return super_resolution(4)(codec.decode(z))

    with torch.no_grad():
        y = operator(y)

    def off(**call: Any) -> float:
        with torch.no_grad():
            x = draw(pipe, ["a", "b"], output_type="latent", **call)
            return float((operator(x) - y).square().mean())

    bare = off(guidance_scale=1.0)
    for method in ("replacement", "pigdm", "tweedie"):
        inverse = LinearInverse(operator, y, 0.01, method, iterations=4)  # type: ignore[arg-type]
        assert off(guidance=inverse) < 0.3 * bare
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_callback_sees_every_step_and_may_replace_the_latents(pipe: Any) -> None:
    seen: list[tuple[int, int, float]] = []

    def callback(
        owner: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        assert owner is pipe and set(tensors) == {"latents"}
        seen.append((step, int(timestep), float(tensors["latents"].std())))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else tensors

    latent = draw(pipe, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == [751, 501, 251, 1]
    assert float(latent.abs().max()) == 0
    bare = draw(pipe)
    watched = draw(pipe, callback_on_step_end=lambda *_: None)
    without = draw(
        pipe,
        callback_on_step_end=lambda pipe, i, t, tensors: tensors,
        callback_on_step_end_tensor_inputs=[],
    )
    assert torch.equal(bare, watched) and torch.equal(bare, without)


def test_progress_bar_counts_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=False)
    draw(pipe, ["a", "b"], batch_size=1)
    assert f"{2 * STEPS}/{2 * STEPS}" in capsys.readouterr().err


def test_scheduler_may_be_swapped(pipe: Any) -> None:
    own = pipe.scheduler
    try:
        before = draw(pipe)
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config, timestep_spacing="trailing")
        assert torch.equal(draw(pipe), draw(pipe, sampler="euler"))
        assert pipe.config["scheduler"] == ("diffusers", "EulerDiscreteScheduler")
    finally:
        pipe.scheduler = own
    assert torch.equal(before, draw(pipe))


def test_a_call_leaves_the_scheduler_alone(pipe: Any) -> None:
    own = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    state = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    draw(pipe)
    assert state == {k: str(v) for k, v in vars(pipe.scheduler).items()}
    pipe.scheduler = own


@pytest.mark.parametrize("name", ["dpm++", "euler-a", None])
def test_threads_share_one_pipeline(pipe: Any, name: str | None) -> None:
    alone = [draw(pipe, f"picture {s}", seed=s, sampler=name) for s in range(5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: draw(pipe, f"picture {s}", seed=s, sampler=name), range(5)))
    for mine, theirs in zip(alone, found, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5


def test_a_cut_prompt_is_reported(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw(pipe, "a heart and then some more words")
    assert "words" in caplog.text


def test_a_safety_checker_runs() -> None:
    class Checker(torch.nn.Module):
        device = torch.device("cpu")

        def forward(
            self, images: torch.Tensor, clip_input: torch.Tensor
        ) -> tuple[torch.Tensor, list[bool]]:
            assert clip_input.shape == (2, 3)
            return images * torch.tensor([1.0, 0.0])[:, None, None, None], [False, True]

    class Features(dict):  # type: ignore[type-arg]
        pixel_values = torch.zeros(2, 3)

        def to(self, device: torch.device) -> "Features":
            return self

    pipe = tiny.pipeline()
    object.__setattr__(pipe, "safety_checker", Checker())
    object.__setattr__(pipe, "feature_extractor", lambda images, return_tensors: Features())
    found = pipe(["a", "b"], num_inference_steps=2, seed=0, output_type="pt")
    assert found.nsfw_content_detected == [False, True]
    assert float(found.images[1].abs().max()) == 0


BAD = {
    "unknown sampler 'dmp++': did you mean 'dpm++'?": {"sampler": "dmp++"},
    "prompt must be a text or a list of texts, not 3": {"prompt": 3},
    "prompt must be a text or a list of texts, not []": {"prompt": []},
    "negative_prompt has 3 texts for 2 prompts": {
        "prompt": ["a", "b"],
        "negative_prompt": ["x", "y", "z"],
    },
    "height must be a multiple of 2 pixels, not 17": {"height": 17},
    "width must be a multiple of 2 pixels, not 0": {"width": 0},
    "steps must lie in 1..1000": {"num_inference_steps": 0},
    "output_type must be one of pil, np, numpy, pt, latent, not 'jpg'": {"output_type": "jpg"},
    "num_images_per_prompt must be at least 1, not 0": {"num_images_per_prompt": 0},
    "batch_size must be at least 1, not 0": {"batch_size": 0},
    "pass either generator or seed, not both": {"generator": torch.Generator()},
    "3 seeds for 1 images": {"seed": [1, 2, 3]},
    "seeds must lie in 0..2^32 - 1, not -1": {"seed": -1},
    "2 generators for 1 images": {"seed": None, "generator": [torch.Generator()] * 2},
    "latents have shape (2, 4, 8, 8), not (1, 4, 8, 8)": {"latents": torch.zeros(2, 4, 8, 8)},
    "only latents, prompt_embeds, negative_prompt_embeds can be passed, not ['image_embeds']": {
        "callback_on_step_end": print,
        "callback_on_step_end_tensor_inputs": ["latents", "image_embeds"],
    },
    "guidance_scale must be a finite number, not nan": {"guidance_scale": float("nan")},
    "guidance_scale must be a finite number, not inf": {"guidance_scale": float("inf")},
    "guidance_scale must be a finite number, not '7'": {"guidance_scale": "7"},
    "guidance_rescale must be a finite number, not nan": {"guidance_rescale": float("nan")},
    "eta must be a finite number, not nan": {"eta": float("nan")},
    "scale must be a finite number, not nan": {"guidance": lambda p, n: ClassifierFree(NAN)(p, n)},
    "seed must be a whole number or a list of them, not 1.5": {"seed": 1.5},
    "num_images_per_prompt must be a whole number, not 1.5": {"num_images_per_prompt": 1.5},
    "num_inference_steps must be a whole number, not 2.5": {"num_inference_steps": 2.5},
    "height must be a whole number, not '16'": {"height": "16"},
    "latents must be a tensor n c h w, not 'noise'": {"latents": "noise"},
    "clip_skip must lie in 0..2, as text_encoder has layers, not 3": {"clip_skip": 3},
    "ip_adapter_image is told an IP-Adapter, and none is loaded": {"ip_adapter_image": object()},
    "cross_attention_kwargs takes {\"scale\": strength of the LoRAs} alone, not {'gligen': 1}": {
        "cross_attention_kwargs": {"gligen": 1}
    },
    "pass either prompt or prompt_embeds, not both": {"prompt_embeds": torch.zeros(1, 24, 32)},
    "callback is not supported: use callback_on_step_end": {"callback": print},
    "DDIMScheduler takes no timesteps of one's own": {"timesteps": [999, 1]},
    "timesteps is not supported": {"timesteps": [999, 1], "sampler": "ode-heun"},
    "timesteps must lie in 0..999, not between 2 and 1500": {
        "timesteps": [1500, 2],
        "sampler": "euler",
    },
    "each of timesteps must be a finite number, not 'x'": {
        "timesteps": [9, "x"],
        "sampler": "euler",
    },
    "each of sigmas must be a finite number, not nan": {"sigmas": [1.0, NAN], "sampler": "euler"},
    "each of sigmas must be a finite number, not None": {"sigmas": [1.0, None]},
    "pass either timesteps or sigmas, not both": {
        "timesteps": [999],
        "sigmas": [1.0, 0.0],
        "sampler": "euler",
    },
}


def test_numbers_of_any_type_and_what_stock_passes_by_default(pipe: Any) -> None:
    plain = draw(pipe, guidance_scale=3.0)
    for same in (
        {"guidance_scale": np.float32(3), "seed": np.int64(0)},
        {"guidance_scale": torch.tensor(3.0), "seed": [torch.tensor(0)]},
        {"guidance_scale": 3, "callback_steps": None, "cross_attention_kwargs": None},
    ):
        assert torch.equal(draw(pipe, **{"guidance_scale": 3.0, **same}), plain)
    array = draw(pipe, guidance_scale=3.0, output_type="numpy")
    assert np.array_equal(array[0], plain[0].permute(1, 2, 0))


def refused(pipe: Any, call: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        draw(pipe, **call)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(pipe: Any, message: str) -> None:
    assert message in refused(pipe, BAD[message])


WHOLE = ("num_inference_steps", "num_images_per_prompt", "height", "width", "batch_size")
REAL = ("guidance_scale", "guidance_rescale", "eta")
ODD_KINDS = [
    *((name, value) for name in WHOLE for value in ("2", 2.0, True, np.float32(2), [2])),
    *((name, value) for name in WHOLE[:2] for value in (torch.ones(3), torch.tensor(True))),
    *((name, value) for name in REAL for value in ("2", True, [1.0, 2.0], torch.ones(3))),
    *((name, None) for name in ("num_images_per_prompt", "guidance_rescale", "eta")),
    *((name, value) for name in REAL for value in (float("nan"), float("inf"), 10**400)),
    *(("seed", value) for value in ("3", 3.0, True, {3}, ["3"], [None], b"3", torch.ones(1))),
    *(("latents", value) for value in (np.zeros((1, 4, 8, 8)), "noise")),
    *(("generator", value) for value in (3, [3], np.random.Generator(np.random.Philox(1)))),
    ("sampler", 3),
    *(
        (name, value)
        for name in ("timesteps", "sigmas")
        for value in (3, [], "9", {9}, np.int64(3))
    ),
    ("sigmas", [1.0]),
    *(("callback_on_step_end", value) for value in (3, "print", [print])),
]


@pytest.mark.parametrize(("name", "value"), ODD_KINDS, ids=lambda v: repr(v).split(" at ")[0])
def test_odd_kinds_are_one_clear_line(pipe: Any, name: str, value: Any) -> None:
    more = {"seed": None} if name == "generator" else {}
    assert refused(pipe, {**more, name: value}).startswith(f"{name} must be a")


def test_numbers_of_other_libraries(pipe: Any) -> None:
    plain = draw(pipe, seed=3, height=24, width=32, guidance_scale=3.0, batch_size=1)
    for kind in (np.int64, np.uint8, torch.tensor, np.array):
        sizes = {name: kind(value) for name, value in {"height": 24, "width": 32}.items()}
        found = draw(
            pipe,
            seed=kind(3),
            num_inference_steps=kind(STEPS),
            batch_size=kind(1),
            num_images_per_prompt=kind(1),
            guidance_scale=kind(3),
            **sizes,
        )
        assert torch.equal(found, plain)
    listed = draw(pipe, timesteps=[999, 500, 9], sampler="euler")
    for kind in (np.array, torch.tensor, tuple):
        assert torch.equal(draw(pipe, timesteps=kind([999, 500, 9]), sampler="euler"), listed)
    several = draw(pipe, num_images_per_prompt=2, seed=[5, 3])
    for seeds in (np.array([5, 3]), torch.tensor([5, 3]), (5, 3), range(5, 1, -2)):
        assert torch.equal(draw(pipe, num_images_per_prompt=2, seed=seeds), several)
    pair = tuple(torch.Generator().manual_seed(s) for s in (5, 3))
    found = draw(pipe, seed=None, generator=pair, num_images_per_prompt=2)
    assert torch.equal(found, several)


TOO_MANY = {
    "num_images_per_prompt must be at most 100,000, not 1,000,000,000": {
        "num_images_per_prompt": 10**9
    },
    "160,000 pictures are too many for one call, of 100,000 at most": {
        "prompt": ["a", "b"],
        "num_images_per_prompt": 80_000,
    },
    "height must be at most 16,384, not 2,147,483,648": {"height": 2**31},
    "num_inference_steps must be at most 1,000,000": {
        "num_inference_steps": 10**12,
        "sampler": "ode-euler",
    },
}


@pytest.mark.parametrize("message", TOO_MANY)
def test_limits_before_anything_is_drawn(pipe: Any, message: str) -> None:
    assert message in refused(pipe, TOO_MANY[message])


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_what_is_no_text(pipe: Any, name: str) -> None:
    for text, told in (("a \ud800 b", "the lone surrogate '\\ud800'"), ("a\0b", "a NUL character")):
        message = refused(pipe, {name: text})
        assert message.startswith(f"{name} 'a") and told in message
        assert told in refused(pipe, {"prompt": "a", name: ["a" * 10_000 + text]})
    with pytest.raises(ValueError, match="lone surrogate"):
        TextConditioner(pipe.tokenizer, pipe.text_encoder).tokenize(["\udfff"])


# --- ldm sample -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("cli") / "tiny-model")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def test_cli_writes_one_png_with_its_parameters(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "heart.png"
    result = run(
        "a red, red heart", "--model", model, "--out", out, "--steps", 4, "--seed", 3,
        "--negative", "blue", "--guidance", 3, "--sampler", "Euler a", "--size", "32x24",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert read_parameters(out) == Parameters(
        "a red, red heart", "blue", 4, "euler-a", 3.0, 3, 32, 24, "tiny-model"
    )
    text = Image.open(out).text["parameters"]  # type: ignore[attr-defined]
    assert text == (
        "a red, red heart\nNegative prompt: blue\n"
        "Steps: 4, Sampler: Euler a, CFG scale: 3, Seed: 3, Size: 32x24, Model: tiny-model"
    )


def test_cli_guides_as_it_is_told(model: Path, tmp_path: Path) -> None:
    common = ("a red heart", "--model", model, "--steps", 4, "--guidance", 5)
    found = []
    for n, more in enumerate([(), ("--guidance-rescale", 0.7), ("--guidance-interval", "-1,1")]):
        out = tmp_path / f"{n}.png"
        assert run(*common, "--out", out, *more).exit_code == 0
        found.append((np.asarray(Image.open(out)).astype(int), read_parameters(out)))
    pictures, told = zip(*found, strict=True)
    assert all(np.abs(pictures[0] - other).max() > 3 for other in pictures[1:])
    assert [(p.rescale, p.interval) for p in told] == [(None, None), (0.7, None), (None, "-1,1")]
    for more, message in (
        (("--guidance-rescale", 2), "--guidance-rescale must lie in 0..1, not 2.0"),
        (("--guidance-interval", "3"), "--guidance-interval must look like -3,3, not '3'"),
        (("--guidance-interval", "3,1"), "--guidance-interval: 3 is not less than 1"),
    ):
        result = run(*common, "--out", tmp_path / "x.png", *more)
        assert result.exit_code != 0 and message in " ".join(result.output.split())


def test_cli_tells_the_family_what_it_takes(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline(**tiny_flux.components(), unet=None)
    pipe.save_pretrained(tmp_path / "flux")
    common = ("two dogs", "--model", tmp_path / "flux", "--steps", 2, "--size", "16x16",
              "--negative", "an apple")  # fmt: skip
    out = tmp_path / "true.png"
    result = run(*common, "--out", out, "--argument", "true_cfg_scale=30")
    assert result.exit_code == 0, result.output
    call = dict(num_inference_steps=2, seed=0, height=16, width=16, negative_prompt="an apple")
    drawn = [pipe("two dogs", **call, **told).images[0] for told in ({"true_cfg_scale": 30}, {})]
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture, drawn[0]) and not np.array_equal(picture, drawn[1])
    assert read_parameters(out).arguments == "true_cfg_scale=30"
    for told, message in (
        ("true_cfg_scale", "--argument must look like NAME=4.5 or NAME=512,512, not 'true_cfg"),
        ("size=big", "--argument must look like NAME=4.5 or NAME=512,512, not 'size=big'"),
        ("seed=3", "--argument seed: it is not of the model's family, but of all drawing"),
        ("original_size=8,8", "original_size is no argument of a model of the family flux"),
    ):
        result = run(*common, "--out", tmp_path / "x.png", "--argument", told)
        assert result.exit_code != 0 and message in " ".join(result.output.split())


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "PNG"])
def test_cli_writes_the_kind_of_its_suffix(model: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"x.{suffix}"
    common = ("--model", model, "--out", out, "--steps", 2, "--seed", 3)
    assert run("ein Höhenzug, 山 🐈", *common).exit_code == 0
    with Image.open(out) as image:
        assert image.format == {"webp": "WEBP", "PNG": "PNG"}.get(suffix, "JPEG")
    assert read_parameters(out) == Parameters(
        "ein Höhenzug, 山 🐈", "", 2, "dpm++", 7.5, 3, 16, 16, "tiny-model"
    )
    assert run("a", "b", *common).exit_code == 0
    assert {f.name for f in tmp_path.iterdir()} == {out.name, *(f"x-000{n}.{suffix}" for n in "01")}


def test_cli_takes_several_loras_and_words(model: Path, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    for name, targets in (("one", ["to_q"]), ("other", ["to_v", "to_out.0"])):
        adapted = tiny.unet()
        attach(adapted, targets, rank=2, alpha=2.0, dora=False)
        for number, weight in enumerate(weights(adapted).values()):
            weight.data.normal_(generator=torch.Generator().manual_seed(number))
        lora.write({"unet": collect(adapted)}, tmp_path / f"{name}.safetensors")
        textual_inversion.write(f"<{name}>", torch.randn(2, tiny.WIDTH), tmp_path / name)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    words = [argument for name in ("one", "other") for argument in ("--embedding", tmp_path / name)]
    common = ("<one> <other>", "--model", model, "--steps", 2, *words)
    found = []
    for scales in ((0.5,), (0.5, 0.25), (0.0, 0.0)):
        out = tmp_path / f"{len(found)}.png"
        given = [argument for scale in scales for argument in ("--lora-scale", scale)]
        loras = files
        if scales == (0.5, 0.25):  # the same as PATH:WEIGHT
            given, loras = [], [f"{file}:{s}" for file, s in zip(files, scales, strict=True)]
        result = run(*common, "--lora", loras[0], "--lora", loras[1], *given, "--out", out)
        assert result.exit_code == 0, result.output
        found.append((np.asarray(Image.open(out)), read_parameters(out).lora))
    told = ["one 0.5, other 0.5", "one 0.5, other 0.25", "one 0, other 0"]
    assert [lora for _, lora in found] == told
    for word in ("one", "other"):
        pipe.load_textual_inversion(tmp_path / word)
    for file, name in zip(files, "ab", strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    call = {"num_inference_steps": 2, "sampler": "dpm++", "output_type": "pil"}
    for (picture, _), scales in zip(found, ([0.5, 0.5], [0.5, 0.25], [0.0, 0.0]), strict=True):
        pipe.set_adapters(["a", "b"], scales)
        assert np.array_equal(picture, np.asarray(draw(pipe, "<one> <other>", **call)[0]))
    assert not np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[1][0], found[2][0])


def test_cli_shows_all_on_one_page(model: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "all" / "page.png"
    common = ("a", "b", "--count", 3, "--model", model, "--steps", 1, "--out", tmp_path / "x.png")
    assert run(*common, "--sheet", sheet).exit_code == 0
    page = np.asarray(Image.open(sheet))
    assert page.shape == (2 * (2 * 16 + 30), 4 * (2 * 16 + 8), 3)
    last = np.asarray(Image.open(tmp_path / "x-0005.png")).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(page[62 : 62 + 32, 40 : 40 + 32], last)
    assert "--sheet writes a .png" in " ".join(run(*common, "--sheet", "page.jpg").output.split())


def test_cli_numbers_many(model: Path, tmp_path: Path) -> None:
    common = ("--model", model, "--steps", 2, "--sampler", "model")
    assert run("a", "b", *common, "--count", 2, "--out", tmp_path / "x.png").exit_code == 0
    assert [f.name for f in sorted(tmp_path.glob("*"))] == [f"x-{i:04d}.png" for i in range(4)]
    folder = tmp_path / "pictures"
    assert run("a", "b", *common, "--out", folder).exit_code == 0
    assert run("c", *common, "--out", folder).exit_code == 0
    found = [read_parameters(f) for f in sorted(folder.glob("*"))]
    assert [(p.prompt, p.seed, p.sampler) for p in found if p] == [
        ("a", 0, "DDIMScheduler"),
        ("b", 1, "DDIMScheduler"),
        ("c", 0, "DDIMScheduler"),
    ]


def test_cli_draws_a_data_set(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    common = ("--model", model, "--steps", 1, "--captions", "--out", folder)
    assert run('a "red"\nhat', "кот", *common, "--count", 2).exit_code == 0
    assert run("c", *common).exit_code == 0
    found = FolderData(str(folder)).examples
    assert [(e.key, e.captions) for e in found] == [
        ("0000.png", ('a "red" hat',)),
        ("0001.png", ('a "red" hat',)),
        ("0002.png", ("кот",)),
        ("0003.png", ("кот",)),
        ("0004.png", ("c",)),
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "MODEL", "--captions"), "--out must be a folder, not"),
        (
            ("--model", "MODEL", "--out", "x.gif"),
            "pictures are written as .png, .jpg, .jpeg, .webp",
        ),
        (
            ("--model", "MODEL", "--out", "x.v2"),
            "a folder whose name looks like a file's has to be",
        ),
        (("--model", "MODEL", "--lora-scale", "1", "--lora-scale", "2"), "is given 2 times for 0"),
        (
            ("--model", "MODEL", "--lora", "MODEL", "--lora-scale", "nan"),
            "--lora-scale must be a finite number, not nan",
        ),
        (
            (
                "--model",
                "MODEL",
                "--lora",
                "MODEL",
                "--lora",
                "MODEL",
                "--lora-scale",
                "1",
                "--lora-scale",
                "inf",
            ),
            "--lora-scale must be a finite number, not inf",
        ),
        (("--model", "MODEL", "--lora", "/nowhere/at/all"), "--lora /nowhere/at/all: there is no"),
        (("--model", "MODEL/unet"), "is one part of a pipeline: name the folder that it lies in"),
        (("--model", "/nowhere/at/all"), "there is no such folder"),
        (("--model", "EMPTY"), "holds no model_index.json"),
        (("--model", "MODEL", "--sampler", "eular"), "did you mean 'euler'?"),
        (("--model", "MODEL", "--size", "big"), "--size must look like 512x512"),
        (("--model", "MODEL", "--size", "17x16"), "multiple of 2 pixels"),
        (("--model", "MODEL", "--steps", "0"), "steps must lie in 1..1000"),
        (("--model", "MODEL", "--count", "0"), "--count must be at least 1"),
        (("--model", "MODEL", "--seed", "-1"), "seeds must lie in"),
        (("--model", "BROKEN"), "error:"),
    ],
)
def test_cli_errors_are_one_line_and_status_2(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text((model / "model_index.json").read_text())
    places = {
        "MODEL": str(model),
        "MODEL/unet": str(model / "unet"),
        "EMPTY": str(tmp_path),
        "BROKEN": str(broken),
    }
    out = () if "--out" in arguments else ("--out", str(tmp_path / "x.png"))
    result = run("a", *(places.get(a, a) for a in arguments), *out)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert result.stdout == "" and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "parameters",
    [
        Parameters("a cat"),
        Parameters("two\nlines: and, commas", "bad\nnegative", 20, "dpm++", 7.5, 2**32 - 1, 8, 9),
        Parameters("кот 🐈", "собака", 1, "LMS", 1.0, 0, 512, 768, 'my, "odd": model', "abc123"),
        Parameters("", "only negative", 5),
        Parameters("Steps: by the sea"),
    ],
    ids=lambda p: p.prompt[:8],
)
def test_round_trip(parameters: Parameters, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{suffix}"
    write_picture(Image.new("RGB", (4, 4)), file, parameters)
    assert read_parameters(file) == parameters
    assert Parameters.parse(str(parameters)) == parameters


def test_a_prompt_too_long_for_a_jpeg_is_told_before_a_model_is_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*told: Any, **named: Any) -> Any:
        raise ValueError("opened")

    monkeypatch.setattr(LatentDiffusionPipeline, "from_pretrained", opened)
    for suffix, texts, told in (
        ("jpg", ("a", "x" * 40_000), "too long for a JPEG: write a .png or .webp"),
        ("jpg", ("x", "--negative", "x" * 32_700), "too long for a JPEG"),
        ("jpg", ("x" * 32_300,), "error: opened"),
        ("webp", ("x" * 40_000,), "error: opened"),
        ("jpg", ("a \ud800",), "error: opened"),
    ):
        found = run(*texts, "--model", model, "--out", tmp_path / f"x.{suffix}")
        assert found.exit_code == 2 and told in found.stderr


def test_comments_of_others(tmp_path: Path) -> None:
    told = "a café\nSteps: 3, Seed: 7"
    for name, comment in {
        "web ui": b"UNICODE\0" + told.encode("utf-16-be"),
        "others": b"UNICODE\0" + told.encode("utf-16-le"),
        "ascii": b"ASCII\0\0\0" + told.encode(),
    }.items():
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        file = tmp_path / f"{name}.jpg"
        Image.new("RGB", (4, 4)).save(file, exif=exif)
        assert read_parameters(file) == Parameters("a café", steps=3, seed=7)
    for suffix in ("jpg", "webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"plain.{suffix}")
        assert read_parameters(tmp_path / f"plain.{suffix}") is None
    long = Parameters("x" * 40_000)
    with pytest.raises(
        ValueError, match="the prompt is too long for a JPEG: write a .png or .webp"
    ):
        write_picture(Image.new("RGB", (4, 4)), tmp_path / "x.jpg", long)
    write_picture(Image.new("RGB", (4, 4)), tmp_path / "x.webp", long)
    assert read_parameters(tmp_path / "x.webp") == long
    with pytest.raises(
        ValueError, match=r"x.gif: a picture is written as .png, .jpg, .jpeg, .webp"
    ):
        write_picture(Image.new("RGB", (4, 4)), tmp_path / "x.gif", Parameters("a"))


def test_png_of_a_web_ui_and_of_nobody(tmp_path: Path) -> None:
    found = Parameters.parse(
        "masterpiece, <lora:x:0.8>\nNegative prompt: bad hands, blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, "
        'Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "x: 1, y: 2", Version: 1'
    )
    assert found == Parameters(
        "masterpiece, <lora:x:0.8>", "bad hands, blurry", 20, "dpm++", 7.0, 965400086, 512, 768,
        "v1-5", "6ce0161689",
    )  # fmt: skip
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_parameters(tmp_path / "plain.png") is None
