"""Random calls, a pure function of their number: legal ones draw what stock draws, or are refused
in one line; illegal ones are refused in one line, and raise nothing else.

``--slow`` asks 200 of each.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import tiny
from ldm.pipeline import LatentDiffusionPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
KINDS = [DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler,
         EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler,
         LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler]  # fmt: skip
WORDS = ["a red heart", "", "two dogs, (blue:1.3) [sky]", "Ünïcödé \U0001f600", "long " * 30]
MOST = 200
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
Call = dict[str, Any]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    parts = tiny.components()
    pipes = LatentDiffusionPipeline(**parts), StableDiffusionPipeline(**parts, **NONE)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shrunk(pipe: Any, step: int, timestep: Any, tensors: Call) -> Call:
    return {"latents": tensors["latents"] * 0.9}


def legal(number: int) -> tuple[type, Callable[[], Call]]:
    """A scheduler, and what makes the arguments: generators are used up by a call."""
    rng = random.Random(f"legal {number}")
    kind, many, each = rng.choice(KINDS), rng.choice([None, 1, 2]), rng.choice([1, 1, 2])
    count = (many or 1) * each

    def texts() -> Any:
        return rng.choice(WORDS) if many is None else [rng.choice(WORDS) for _ in range(many)]

    call: Call = {"num_images_per_prompt": each, "num_inference_steps": rng.randint(2, 4),
                  "guidance_scale": rng.choice([0, 1, 1.0, 2.5, 7.5, 20.0]),
                  "guidance_rescale": rng.choice([0.0, 0.0, 0.5]),
                  "eta": rng.choice([0.0, 0.5]),
                  "output_type": rng.choice(["latent", "np", "pt", "pil"])}  # fmt: skip
    if rng.random() < 0.25:
        shape = (many or 1), 24, tiny.WIDTH
        call["prompt_embeds"] = noise(*shape, seed=number)
        call["negative_prompt_embeds"] = noise(*shape, seed=number + 1)
    else:
        call["prompt"] = texts()
        if rng.random() < 0.5:
            call["negative_prompt"] = texts()
    sides = [rng.choice([8, 16, 24]) for _ in range(2)]
    height, width = sides if rng.random() < 0.5 else (None, None)
    call |= {"height": height, "width": width}
    if kind in (EulerDiscreteScheduler, HeunDiscreteScheduler) and rng.random() < 0.4:
        call |= {"num_inference_steps": None, "timesteps": [999, 600, 10]}
    elif kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler) and rng.random() < 0.4:
        own = {"sigmas": [14.0, 3.0, 0.5, 0.0]}  # which stock's DPM-Solver++ takes none of
        own = own if kind is EulerDiscreteScheduler else {"timesteps": [999, 600, 10]}
        call |= {"num_inference_steps": None, **own}
    if rng.random() < 0.3:
        call["callback_on_step_end"] = shrunk
    if rng.random() < 0.2:
        call["cross_attention_kwargs"] = {"scale": 0.5}
    given = rng.choice(["one", "list", "latents"])

    def made() -> Call:
        if given == "latents":
            sides = ((height or 16) // 2, (width or 16) // 2)
            told = {"latents": noise(count, 4, *sides, seed=number)}
        elif given == "list":
            told = {"generator": [torch.Generator().manual_seed(n) for n in range(count)]}
        else:
            told = {"generator": torch.Generator().manual_seed(number)}
        torch.manual_seed(number)  # beside latents of one's own stock draws from there
        return call | told

    return kind, made


def array(images: Any) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        return images.numpy()
    scale = 255 if hasattr(images[0], "mode") else 1  # of PIL
    return np.stack([np.asarray(image) / scale for image in images])


def one_line(error: Exception) -> str:
    line = str(error)
    assert line and "\n" not in line and len(line) < 400, line
    return line


def check_legal(pair: tuple[Any, Any], numbers: range) -> Counter[str]:
    """How many were refused, by what they were told."""
    ours, stock = pair
    named = Counter[str]()
    for number in numbers:
        kind, made = legal(number)
        more = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
        for pipe in pair:
            pipe.scheduler = kind.from_config(tiny.scheduler().config, **more)
        expected = array(stock(**made()).images)
        try:
            found = array(ours(**made()).images)
        except ValueError as error:
            named[one_line(error)] += 1
            continue
        assert found.shape == expected.shape, (number, kind, made())
        apart = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        assert apart <= 1e-5, (number, kind.__name__, apart, made())
    return named


WRONG: dict[str, list[Any]] = {
    "prompt": [3, [], [3], ["a", None], b"a", {"a"}, "a\0b", ("a",), None, "a \ud800"],
    "negative_prompt": [3, [], ["a"] * 7, b"x", [None], "a\0b"],
    "height": [17, -8, 0, 1.5, "16", True, 10**9, [16], torch.ones(2), float("nan")],
    "width": [17, -8, 0, 1.5, "16", True, 10**9, [16], torch.ones(2), float("nan")],
    "num_inference_steps": [0, -1, 2.0, "3", True, 10**9, [2], float("inf")],
    "timesteps": [[], "9", [-1], [None], {9}, 3, [5000], ["a"], [float("nan")]],
    "sigmas": [[], [1.0], ["a", "b"], "99", 3, [float("nan"), 0.0], [None, 0.0]],
    "guidance_scale": [float("nan"), float("inf"), "7", [7.0], True, torch.ones(2), 10**400],
    "guidance_rescale": [None, float("nan"), "x", [0.5]],
    "num_images_per_prompt": [0, -1, 1.5, "2", True, 10**9, None, [1]],
    "eta": [None, float("nan"), "0", [0.0]],
    "generator": [3, [3], "g", np.random.default_rng(0), [torch.Generator()] * 9],
    "latents": [torch.zeros(1, 4, 3, 3), np.zeros((1, 4, 8, 8)), "noise", torch.zeros(4, 8, 8),
                torch.full((1, 4, 8, 8), float("nan")), torch.zeros(9, 4, 8, 8)],
    "prompt_embeds": [torch.zeros(1, 24, 31), torch.zeros(1, 24), "e", torch.zeros(0, 24, 32),
                      torch.zeros(1, 24, 32, dtype=torch.int64), [torch.zeros(24, 32)]],
    "negative_prompt_embeds": [torch.zeros(1, 24, 31), torch.zeros(1, 24), "e",
                               torch.zeros(5, 24, 32)],
    "output_type": ["jpg", 3, None, ["pil"], {"pil"}],
    "cross_attention_kwargs": [3, {"gligen": 1}, {"scale": "x"}, [1], {"scale": float("nan")}],
    "clip_skip": [-1, 99, 1.5, "1", True, [1]],
    "callback_on_step_end": [3, "f", [print]],
    "callback_on_step_end_tensor_inputs": [["time"], 3, [3], "time", [["latents"]]],
    "sampler": ["dmp++", 3, "", ["ddim"]],
    "seed": [-1, 2**32, 1.5, "3", [1] * 9, [None], {1}],
    "batch_size": [0, -1, "2", 1.5, [1]],
    "guidance": [3, "cfg", [1.0], 7.5],
    "prompt_syntax": ["compel", 3, ["a1111"]],
    "denoising_start": [float("nan"), 2.0, -1.0, "0.5", [0.5]],
    "denoising_end": [float("nan"), 2.0, -1.0, "0.5", [0.5]],
    "image": [3, "x.png", [3], torch.zeros(3), np.zeros((2, 2))],
    "mask_image": [3, "x.png", np.ones((16, 16), np.float32)],
    "strength": [2.0, -1.0, "x", float("nan"), 0.5],
    "feather": [-1, "x", 1.5, 2],
    "variation": [3, (1,), (1, 2.0), (None, 0.5), "ab", (1, [0.5] * 9), (1, float("nan"))],
    "prompt_2": ["a"],
    "pooled_prompt_embeds": [torch.zeros(1, 32)],
    "true_cfg_scale": [2.0],
    "noise_level": [10],
    "aesthetic_score": [6.0],
    "callback": [print],
    "callback_steps": [1],
    "joint_attention_kwargs": [3, {"x": 1}],
    "target_size": [(16, 16)],
    "original_size": [(16, 16)],
    "max_sequence_length": [16],
    "anything": [1],
    "enlarge": [0, 1, 100, "2", (2, 3), (), True, float("nan"), (2, 0.5, "x"), {2}],
    "padding_mask_crop": [-1, "x", 1.5, True, 2],
}  # fmt: skip
ILLEGAL = [(name, value) for name, values in WRONG.items() for value in values]


def check_illegal(ours: Any, numbers: range | list[int]) -> None:
    """Whatever a call was asked to do, it is refused before anything is drawn."""
    for number in numbers:
        name, value = ILLEGAL[number % len(ILLEGAL)]
        kind, made = legal(number)
        call = made()
        if name.startswith("callback_on_step_end_"):
            call["callback_on_step_end"] = shrunk
        if name == "seed":
            call.pop("generator", None)
        if name == "prompt":
            call.pop("prompt_embeds", None)
            call.pop("negative_prompt_embeds", None)
        ours.scheduler = kind.from_config(tiny.scheduler().config)
        try:
            ours(**call | {name: value})
        except ValueError as error:
            one_line(error)
        except Exception as error:
            raise AssertionError(f"{name}={value!r}: {type(error).__name__} {error}") from error
        else:
            raise AssertionError(f"{name}={value!r} was drawn, of {call}")


def test_a_few_legal_calls_are_stocks(pair: tuple[Any, Any]) -> None:
    assert not check_legal(pair, range(10))


def test_illegal_calls_are_one_line(pair: tuple[Any, Any]) -> None:
    step = len(ILLEGAL) / 64  # of every argument some
    check_illegal(pair[0], [int(n * step) for n in range(64)])


@pytest.mark.slow
def test_legal_calls_are_stocks_or_named(pair: tuple[Any, Any]) -> None:
    named = check_legal(pair, range(MOST))
    print(f"{sum(named.values())} of {MOST} refused: {dict(named)}")
    assert sum(named.values()) <= MOST // 20


@pytest.mark.slow
def test_all_illegal_calls_are_one_line(pair: tuple[Any, Any]) -> None:
    check_illegal(pair[0], range(max(MOST, len(ILLEGAL))))
