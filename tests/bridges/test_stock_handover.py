"""The way from noise to data in two parts: ours against stock SDXL's base and refiner, and against
the whole way.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

import tiny
from ldm.diffusion import Condition, DiscreteVP, Level, Prediction, Predictor, predictor
from ldm.diffusion.schedulers import scheduler_config
from ldm.guidance import ClassifierFree
from ldm.sampling import SchedulerSampler, own_sampler, sampler
from turns import turns

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
COUNT, POOLED, SIZE, CROP = 2, 16, (24, 20), (3, 5)
CONFIG = {**scheduler_config(DiscreteVP(), "eps"), "steps_offset": 1, "clip_sample": False}
FIRST_ORDER = [DDIMScheduler, EulerDiscreteScheduler]
KINDS = [
    *FIRST_ORDER,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=tiny.WIDTH,
            attention_head_dim=(4, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,
        )
    for name, parameter in made.named_parameters():
        if "attn2.to_out" in name or "attn2.to_v" in name or "add_embedding" in name:
            parameter.data *= 4
    return made.eval()


TEXT = {
    "prompt_embeds": drawn(COUNT, 7, tiny.WIDTH, seed=1),
    "negative_prompt_embeds": drawn(COUNT, 7, tiny.WIDTH, seed=2),
    "pooled_prompt_embeds": drawn(COUNT, POOLED, seed=3),
    "negative_pooled_prompt_embeds": drawn(COUNT, POOLED, seed=4),
}
NOISE = drawn(COUNT, *tiny.LATENT, seed=5)


def scheduler(kind: type[Any]) -> Any:
    return kind.from_config(CONFIG)


def stock(unet: UNet2DConditionModel, kind: type[Any], steps: int, x: Tensor, **part: float):
    """What stock makes of noise (without a ``denoising_start``) or of a latent."""
    refines = "denoising_start" in part
    cls = StableDiffusionXLImg2ImgPipeline if refines else StableDiffusionXLPipeline
    more = {"requires_aesthetics_score": False} if refines else {}
    pipe = cls(
        vae=tiny.vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler(kind),
        add_watermarker=False,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **TEXT,
        **({"image": x} if refines else {"latents": x}),
        **part,
        num_inference_steps=steps,
        guidance_scale=5.0,
        original_size=SIZE,
        target_size=(16, 16),
        crops_coords_top_left=CROP,
        negative_original_size=SIZE,
        negative_target_size=(16, 16),
        negative_crops_coords_top_left=CROP,
        output_type="latent",
    ).images


@torch.no_grad()
def ours(
    unet: UNet2DConditionModel, kind: type[Any] | str, steps: int, x: Tensor, **named: Any
) -> Tensor:
    def denoise(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        told = {"text_embeds": cond.pooled, "time_ids": cond.extra["time_ids"]}
        return unet(x_t, timestep, encoder_hidden_states=cond.tokens, added_cond_kwargs=told).sample

    ids = torch.tensor([[*SIZE, *CROP, 16, 16]]).repeat(COUNT, 1)
    cond, null = (
        Condition(TEXT[f"{name}prompt_embeds"], None, TEXT[pooled], {"time_ids": ids})
        for name, pooled in (
            ("", "pooled_prompt_embeds"),
            ("negative_", "negative_pooled_prompt_embeds"),
        )
    )
    which = sampler(kind, CONFIG) if isinstance(kind, str) else own_sampler(scheduler(kind))
    guided = ClassifierFree(5.0)(predictor(denoise, "eps"), null)
    return which(guided, x, cond, steps=steps, **named)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype and bool((a[0] - a[1]).abs().max() > 0.1)
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps", "share"),
    # Slow is what test_stock_sdxl asks of the pipelines.
    [pytest.param(10, 0.8, marks=pytest.mark.slow), (7, 0.5)],
)
def test_base_and_refiner_are_stocks(unet, kind: type[Any], steps: int, share: float) -> None:
    base = stock(unet, kind, steps, NOISE, denoising_end=share)
    mine = ours(unet, kind, steps, NOISE, denoising_end=share)
    # Measured: 0, bit for bit, in every case.
    assert apart(mine, base) <= 1e-6
    refined = stock(unet, kind, steps, base, denoising_start=share)
    assert apart(ours(unet, kind, steps, mine, denoising_start=share), refined) <= 1e-6
    assert apart(refined, base) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_in_the_middle_is_stocks(unet, kind: type[Any]) -> None:
    part = {"denoising_start": 0.3, "denoising_end": 0.75}
    assert apart(ours(unet, kind, 8, NOISE, **part), stock(unet, kind, 8, NOISE, **part)) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "steps", "share"),
    turns([*FIRST_ORDER, "ddim", "euler", "ode-euler", "ode-heun"], [(10, 0.8), (7, 0.35)]),
)
def test_two_parts_are_the_whole(unet, kind: type[Any] | str, steps: int, share: float) -> None:
    whole = ours(unet, kind, steps, NOISE)
    between = ours(unet, kind, steps, NOISE, denoising_end=share)
    assert apart(between, whole) > 0.01
    assert apart(ours(unet, kind, steps, between, denoising_start=share), whole) <= 1e-6


def test_the_network_is_asked_at_the_timesteps_of_the_part() -> None:
    asked: list[float] = []
    told: list[tuple[int, float]] = []

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        asked.append(float(timestep))
        return Prediction(x_t, level, torch.zeros_like(x_t), "eps")

    def callback(index: int, timestep: Tensor, latent: Tensor) -> None:
        told.append((index, float(timestep)))

    counts = {}
    for kind in KINDS:
        which = own_sampler(scheduler(kind))
        assert isinstance(which, SchedulerSampler)
        every = which.start(50).timesteps.tolist()
        for part in ({"denoising_end": 0.8}, {"denoising_start": 0.8}):
            asked.clear()
            told.clear()
            which(predict, NOISE, Condition(), steps=50, callback=callback, **part)
            assert told == list(enumerate(asked))
            assert len(asked) == which.evaluations(50, **part)
            counts[kind, *part] = len(asked)
            first = 0 if "denoising_end" in part else len(every) - len(asked)
            assert asked == every[first : first + len(asked)]
            if "denoising_end" in part:
                assert min(asked) >= 200
            elif which.start(50).order == 1:
                assert max(asked) < 200
    # The step of order two that the base leaves half done is begun again.
    assert counts[HeunDiscreteScheduler, "denoising_end"] == 79
    assert counts[HeunDiscreteScheduler, "denoising_start"] == 21
    assert counts[DDIMScheduler, "denoising_end"] == 40
    assert counts[DDIMScheduler, "denoising_start"] == 10


def nothing(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
    raise AssertionError("asked")


@pytest.mark.parametrize("kind", ["euler", "ode-euler"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"denoising_start": 1.0}, r"^denoising_start must lie in \[0, 1\), not 1.0$"),
        ({"denoising_start": -0.1}, r"^denoising_start must lie in \[0, 1\), not -0.1$"),
        ({"denoising_start": float("nan")}, r"^denoising_start must lie in \[0, 1\), not nan$"),
        ({"denoising_end": 0.0}, r"^denoising_end must lie in \(0, 1\], not 0.0$"),
        ({"denoising_end": 20}, r"^denoising_end must lie in \(0, 1\], not 20$"),
        (
            {"denoising_start": 0.8, "denoising_end": 0.8},
            r"^denoising_start \(0.8\) must be less than denoising_end \(0.8\)$",
        ),
        (
            {"denoising_start": 0.51, "denoising_end": 0.52},
            "^nothing to do between denoising_start 0.51 and denoising_end 0.52: none of the 4"
            " evaluations lies there; use more steps$",
        ),
    ],
)
def test_what_is_no_part_is_told(kind: str, part: dict[str, float], message: str) -> None:
    predict: Predictor = nothing
    which = sampler(kind, CONFIG)
    with pytest.raises(ValueError, match=message):
        which(predict, NOISE, Condition(), steps=4, **part)
    with pytest.raises(ValueError, match=message):
        which.evaluations(4, **part)


@pytest.mark.parametrize("kind", [PNDMScheduler, LMSDiscreteScheduler])
def test_a_scheduler_that_needs_its_first_steps_is_told(kind: type[Any]) -> None:
    which = own_sampler(scheduler(kind))
    with pytest.raises(ValueError, match=f"^{kind.__name__} knows no denoising_start or denoising"):
        which(nothing, NOISE, Condition(), steps=10, denoising_start=0.8)


def test_two_ways_to_say_a_part_are_one_too_many() -> None:
    which = sampler("ode-euler", CONFIG)
    with pytest.raises(ValueError, match="^pass either start and stop or denoising_start and"):
        which(nothing, NOISE, Condition(), steps=4, start=0.5, denoising_end=0.8)  # type: ignore[call-arg]
