"""What a user of the pipeline and of ``ldm sample`` meets."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner

import tiny
from ldm.cli import app
from ldm.data.folder import FolderData
from ldm.diffusion import Prediction, Target, predictor
from ldm.guidance import ClassifierFree, LinearInverse
from ldm.guidance.operators import super_resolution
from ldm.interop.png import Parameters, read_png, write_png
from ldm.models.codec import VaeCodec
from ldm.sampling import PROCESS_SAMPLERS, SAMPLERS

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
    for size in (1, 2, 4, 5):
        split = draw(pipe, prompts, seed=7, num_images_per_prompt=2, sampler=name, batch_size=size)
        assert float((split - whole).abs().max()) < 1e-4
    for i in range(6):
        alone = draw(pipe, prompts[i // 2], seed=7 + i, sampler=name)
        assert float((alone[0] - whole[i]).abs().max()) < 1e-4
    assert float((whole[0] - whole[1]).abs().max()) > 0.05


@pytest.mark.parametrize("speaks", ["v", "x0"])
@pytest.mark.parametrize("name", [*SAMPLERS, *OWN, None])
def test_the_same_picture_whatever_the_network_speaks(
    monkeypatch: pytest.MonkeyPatch, speaks: Target, name: str | None
) -> None:
    pipe = tiny.pipeline()
    eps = draw(pipe, sampler=name)

    def said(denoiser: Any, target: Target) -> Any:
        assert target == speaks  # what the folder says of its network
        inner = predictor(denoiser, "eps")

        def predict(*asked: Any) -> Prediction:
            found = inner(*asked)
            return replace(found, y=found.as_(speaks), target=speaks)

        return predict

    monkeypatch.setattr("ldm.pipeline.predictor", said)
    kind = {"v": "v_prediction", "x0": "sample"}[speaks]
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
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

    for method in ("replacement", "pigdm", "tweedie"):
        inverse = LinearInverse(operator, y, 0.01, method, iterations=8)  # type: ignore[arg-type]
        assert off(guidance=inverse) < 0.3 * off(guidance_scale=1.0)
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
    alone = [draw(pipe, f"picture {s}", seed=s, sampler=name) for s in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: draw(pipe, f"picture {s}", seed=s, sampler=name), range(8)))
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
    "guidance_scale must be a finite number, not None": {"guidance_scale": None},
    "guidance_scale must be a finite number, not '7'": {"guidance_scale": "7"},
    "guidance_rescale must be a finite number, not nan": {"guidance_rescale": float("nan")},
    "eta must be a finite number, not nan": {"eta": float("nan")},
    "scale must be a finite number, not nan": {"guidance": lambda p, n: ClassifierFree(NAN)(p, n)},
    "seed must be a whole number or a list of them, not 1.5": {"seed": 1.5},
    "num_images_per_prompt must be a whole number, not 1.5": {"num_images_per_prompt": 1.5},
    "num_inference_steps must be a whole number, not 2.5": {"num_inference_steps": 2.5},
    "height must be a whole number, not '16'": {"height": "16"},
    "latents must be a tensor of shape (1, 4, 8, 8), not 'noise'": {"latents": "noise"},
    "clip_skip is not supported": {"clip_skip": 1},
    "ip_adapter_image is not supported": {"ip_adapter_image": object()},
    "cross_attention_kwargs is not supported: the strength of a LoRA is that of set_adapters": {
        "cross_attention_kwargs": {"scale": 0.5}
    },
    "prompt_embeds is not supported: pass the text as prompt": {"prompt_embeds": torch.zeros(1)},
    "callback is not supported: use callback_on_step_end": {"callback": print},
    "DDIMScheduler takes no timesteps of one's own": {"timesteps": [999, 1]},
    "timesteps is not supported": {"timesteps": [999, 1], "sampler": "ode-heun"},
    "timesteps must lie in 0..999, not between 2 and 1500": {
        "timesteps": [1500, 2],
        "sampler": "euler",
    },
    "pass either timesteps or sigmas, not both": {
        "timesteps": [999],
        "sigmas": [1.0],
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


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(pipe: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        draw(pipe, **BAD[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)


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
        "--negative", "blue", "--guidance", 3, "--sampler", "euler-a", "--size", "32x24",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert read_png(out) == Parameters(
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
        found.append((np.asarray(Image.open(out)).astype(int), read_png(out)))
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


def test_cli_numbers_many(model: Path, tmp_path: Path) -> None:
    common = ("--model", model, "--steps", 2, "--sampler", "model")
    assert run("a", "b", *common, "--count", 2, "--out", tmp_path / "x.png").exit_code == 0
    assert [f.name for f in sorted(tmp_path.glob("*"))] == [f"x-{i:04d}.png" for i in range(4)]
    folder = tmp_path / "pictures"
    assert run("a", "b", *common, "--out", folder).exit_code == 0
    assert run("c", *common, "--out", folder).exit_code == 0
    found = [read_png(f) for f in sorted(folder.glob("*"))]
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
    places = {"MODEL": str(model), "EMPTY": str(tmp_path), "BROKEN": str(broken)}
    out = ("--out", str(tmp_path / "x.png"))
    result = run("a", *(places.get(a, a) for a in arguments), *out)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert result.stdout == "" and not (tmp_path / "x.png").exists()


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
def test_png_round_trip(parameters: Parameters, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    write_png(Image.new("RGB", (4, 4)), file, parameters)
    assert read_png(file) == parameters
    assert Parameters.parse(str(parameters)) == parameters


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
    assert read_png(tmp_path / "plain.png") is None
