"""Our pipeline against stock ``StableDiffusionPipeline``: one folder, the same latents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

import tiny
from ldm.diffusion import Condition, Level, Prediction
from ldm.guidance import ClassifierFree
from ldm.pipeline import LatentDiffusionPipeline
from turns import turns

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PROMPTS = ["a red heart", "a slice of pizza"]
TARGETS = ("eps", "v")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {t: tiny.folder(tmp_path_factory.mktemp(t) / "model", t) for t in TARGETS}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    pairs = {}
    for target, folder in folders.items():
        pair = (
            LatentDiffusionPipeline.from_pretrained(folder),
            StableDiffusionPipeline.from_pretrained(folder),
        )
        for pipe in pair:
            pipe.set_progress_bar_config(disable=True)
        pairs[target] = pair
    return pairs


def latents(count: int = 2) -> Tensor:
    return torch.randn(count, *tiny.LATENT, generator=torch.Generator().manual_seed(1))


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    call = {"prompt": PROMPTS, "latents": latents(), "output_type": "np", **arguments}
    return pipe(**call).images


def difference(pair: tuple[Any, Any], **arguments: Any) -> float:
    ours, stock = (draw(pipe, **arguments) for pipe in pair)
    assert ours.shape == stock.shape and ours.dtype == stock.dtype
    assert 0.02 < stock.std() and np.abs(stock[0] - stock[1]).max() > 0.02  # neither is blank
    return float(np.abs(ours - stock).max())


def swap(pair: tuple[Any, Any], kind: type[Any], **pins: Any) -> tuple[Any, Any]:
    for pipe in pair:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **pins)
    return pair


SCHEDULERS = [
    (DDIMScheduler, 20, {}),
    (DPMSolverMultistepScheduler, 10, {}),
    (EulerDiscreteScheduler, 10, {}),
    (PNDMScheduler, 10, {"skip_prk_steps": True}),
    (PNDMScheduler, 8, {"skip_prk_steps": False}),
    (DDIMScheduler, 7, {"timestep_spacing": "trailing"}),
    (DPMSolverMultistepScheduler, 8, {"use_karras_sigmas": True}),
    (HeunDiscreteScheduler, 8, {}),
    (UniPCMultistepScheduler, 8, {}),
]


@pytest.mark.parametrize("kind, steps, pins, target", turns(SCHEDULERS, TARGETS))
def test_same_pictures(
    both: dict[str, tuple[Any, Any]], kind: type[Any], steps: int, pins: dict[str, Any], target: str
) -> None:
    pair = swap(both[target], kind, **pins)
    # Measured: 0, bit for bit, in every case.
    assert difference(pair, num_inference_steps=steps, guidance_scale=7.5) <= 1e-6


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_one_generator_draws_as_stock(both: dict[str, tuple[Any, Any]], kind: type[Any]) -> None:
    pair = swap(both["eps"], kind)
    found = [
        draw(
            pipe,
            latents=None,
            generator=torch.Generator().manual_seed(5),
            num_inference_steps=6,
            eta=0.5,
        )
        for pipe in pair
    ]
    assert np.abs(found[0] - found[1]).max() <= 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"negative_prompt": ["blue", "a dog"]},
        {"prompt": "one", "num_images_per_prompt": 2},
        {"num_images_per_prompt": 2, "latents": latents(4), "negative_prompt": ["blue", ""]},
        {"prompt": "a very long prompt " * 5, "latents": latents(1), "num_images_per_prompt": 1},
        {
            "latents": torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0)),
            "height": 24,
            "width": 16,
        },
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_mean_what_stock_means(
    both: dict[str, tuple[Any, Any]], arguments: dict[str, Any]
) -> None:
    pair = swap(both["eps"], DDIMScheduler)
    call = {"prompt": PROMPTS, "latents": latents(), "output_type": "np", **arguments}
    found = [pipe(**call, num_inference_steps=5).images for pipe in pair]
    assert np.abs(found[0] - found[1]).max() <= 1e-6


def test_folder_is_stock(folders: dict[str, Path]) -> None:
    folder = folders["eps"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert index[name] == [None, None]
    assert index["requires_safety_checker"] is False
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["steps_offset"] == 1 and scheduler["clip_sample"] is False
    assert type(DiffusionPipeline.from_pretrained(folder)) is StableDiffusionPipeline


def test_opens_what_stock_saves(both: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    stock = swap(both["v"], DDIMScheduler)[1]
    stock.save_pretrained(tmp_path)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert difference((ours, stock), num_inference_steps=5) <= 1e-6


def test_saving_again_names_no_folder_of_this_machine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    LatentDiffusionPipeline.from_pretrained(folders["eps"]).save_pretrained(tmp_path / "again")
    files = [file for file in (tmp_path / "again").rglob("*.json")]
    assert len(files) > 5
    assert not [file for file in files if str(folders["eps"]) in file.read_text()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_folder_needs_no_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.pipeline().to(dtype).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "text_encoder/config.json").read_text())
    assert config["dtype"] == "float32"
    pair = (
        LatentDiffusionPipeline.from_pretrained(tmp_path),
        StableDiffusionPipeline.from_pretrained(tmp_path),
    )
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            assert part.dtype == torch.float32
    assert difference(pair, num_inference_steps=5) <= 1e-6
    # The rounding of the weights is all that separates it from the float32 original.
    whole = draw(tiny.pipeline(), num_inference_steps=5)
    assert 0 < np.abs(draw(pair[0], num_inference_steps=5) - whole).max() < 0.1


def test_a_half_precision_folder_of_stock_opens_in_float32(tmp_path: Path) -> None:
    parts = tiny.components()
    stock = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.to(dtype=torch.float16).save_pretrained(tmp_path)
    assert StableDiffusionPipeline.from_pretrained(tmp_path).text_encoder.dtype == torch.float16
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert ours.text_encoder.dtype == ours.unet.dtype == torch.float32
    asked = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert asked.text_encoder.dtype == asked.unet.dtype == asked.vae.dtype == torch.bfloat16


def test_bfloat16_keeps_the_schedulers_maths_in_float32() -> None:
    pipe, whole = tiny.pipeline(), tiny.pipeline()
    seen: list[tuple[torch.dtype, float]] = []

    def preview(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        x = tensors["latents"]
        decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        seen.append((x.dtype, float(decoded.float().std())))
        return tensors if step % 2 else {}

    call = {"num_inference_steps": 6, "output_type": "latent"}
    found = draw(pipe.to(torch.bfloat16), callback_on_step_end=preview, **call)
    assert found.dtype == torch.bfloat16  # as in stock
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] * 6 and min(s for _, s in seen) > 0
    # What is handed out is rounded; what is gone on with is not.
    assert torch.equal(found, draw(pipe, **call))
    cond = Condition(torch.zeros(2, 3, tiny.WIDTH, dtype=torch.bfloat16))
    y = pipe.denoiser(latents(), torch.tensor(3), cond)
    assert y.dtype == torch.float32  # guidance extrapolates by 7.5: not in bfloat16
    exact = draw(whole, **call)
    assert float((found - exact).abs().mean() / exact.std()) < 0.1


def test_an_old_scheduler_config_is_read_as_stock_reads_it(tmp_path: Path) -> None:
    # Neither steps_offset = 1 nor clip_sample = False: stock sets both and so do we.
    parts = tiny.components()
    parts["scheduler"] = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    ours = LatentDiffusionPipeline(**parts)
    parts["scheduler"] = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    stock = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    assert difference((ours, stock), num_inference_steps=10) <= 1e-6


@pytest.mark.parametrize("shape", [(5,), (4, 8, 8), (3, 2, 4, 4, 2)])
def test_rescale_is_stock_at_any_number_of_axes(shape: tuple[int, ...]) -> None:
    y = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    level = Level(torch.tensor(0.6), torch.tensor(0.8))
    sizes = []

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        sizes.append((len(x_t), cond.tokens[:, 0, 0].tolist()))
        return Prediction(x_t, level, y, "v")

    null, cond = Condition(torch.zeros(3, 1, 1)), Condition(torch.ones(3, 1, 1))
    for rescale in (0.0, 0.3, 1.0):
        for given in (null, Condition(torch.zeros(1, 1, 1))):
            guided = ClassifierFree(7.5, rescale)(predict, given)
            found = guided(torch.zeros(3, *shape), level, torch.tensor(3), cond)
            plain = y[:3] + 7.5 * (y[3:] - y[:3])
            stock = rescale_noise_cfg(plain, y[3:], rescale) if rescale > 0 else plain
            assert torch.equal(found.y, stock) and found.target == "v"
    assert all(size == (6, [0, 0, 0, 1, 1, 1]) for size in sizes)
    std = ClassifierFree(7.5, 1.0)(predict, null)(torch.zeros(3, *shape), level, level.alpha, cond)
    assert torch.allclose(std.y.flatten(1).std(1), y[3:].flatten(1).std(1), rtol=1e-5)


def test_guidance_takes_a_level_per_sample() -> None:
    level = Level(torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        assert level.alpha.shape == timestep.shape == (4,)
        return Prediction(x_t, level, level.like(x_t).alpha * x_t + cond.tokens[:, 0], "eps")

    null, cond = Condition(torch.zeros(2, 1, 1)), Condition(torch.ones(2, 1, 1))
    x = torch.tensor([[1.0], [2.0]])
    found = ClassifierFree(3.0)(predict, null)(x, level, torch.tensor([5, 6]), cond)
    assert torch.allclose(found.y, torch.tensor([[0.6 + 3], [1.6 + 3]]))
    assert found.level is level and found.x_t is x


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_no_guidance_is_the_bare_predictor(scale: float) -> None:
    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        raise AssertionError

    assert ClassifierFree(scale)(predict, Condition(torch.zeros(1, 1, 1))) is predict
