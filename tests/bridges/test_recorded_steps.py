"""Steps that were written down are those of the scheduler itself, to the bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
    PNDMScheduler,
)
from torch import Tensor

import tiny
from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Level,
    Prediction,
    RectifiedFlow,
    Target,
    scheduler_config,
)
from ldm.diffusion.target import System
from ldm.guidance import ClassifierFree
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import FLOW_SAMPLERS, SAMPLERS, SchedulerSampler, recorded, sampler
from ldm.sampling.steps import Steps

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
STEPS = 5
VP, FLOW = scheduler_config(DiscreteVP(), "v"), scheduler_config(RectifiedFlow(), "velocity")
STOCK = {
    "deis": SchedulerSampler(DEISMultistepScheduler, scheduler_config(DiscreteVP(), "eps")),
    "single": SchedulerSampler(DPMSolverSinglestepScheduler, scheduler_config(DiscreteVP(), "eps")),
    "clipped": SchedulerSampler(DDIMScheduler, {**VP, "clip_sample": True}),
    # By what they do not know beforehand: numbers of a latent, noise, what they add up in place.
    "thresholded": SchedulerSampler(DDIMScheduler, {**VP, "thresholding": True}),
    "noisy": SchedulerSampler(DDIMScheduler, VP, eta=0.5),
    "runge-kutta": SchedulerSampler(PNDMScheduler, scheduler_config(DiscreteVP(), "eps")),
}
NEVER = ("thresholded", "noisy", "runge-kutta", "ddpm", "euler-a")


@pytest.fixture(autouse=True)
def _new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recorded, "_WAYS", type(recorded._WAYS)())
    yield


def noise(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def drawn(stepper: SchedulerSampler, x: Tensor, *, itself: bool = False, **part: Any) -> Tensor:
    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        y = (x_t * float(level.alpha)).tanh() - 0.1 * x_t + timestep / 1e4
        return Prediction(x_t, level, y, stepper.target)

    generator = torch.Generator().manual_seed(7)
    scheduler = stepper.start(STEPS)
    return stepper.run(scheduler, predict, x, Condition(), generator, itself=itself, **part)


@pytest.mark.parametrize("name", [*SAMPLERS, *FLOW_SAMPLERS, *STOCK])
def test_recorded_steps_are_the_scheduler_s(name: str) -> None:
    stepper = STOCK.get(name) or sampler(name, FLOW if name in FLOW_SAMPLERS else VP)
    for seed in range(4):  # by itself, written down, done again, done again with other numbers
        x = noise(seed)
        assert torch.equal(drawn(stepper, x), drawn(stepper, x, itself=True))
    way = next(iter(recorded._WAYS.values()), False)
    if name in NEVER:
        assert way is False
        return
    assert isinstance(way, recorded._Way) and len(recorded._WAYS) == 1
    # Only what is done to latents is left of the steps, and no value is kept behind the last.
    most = 28 if name == "unipc" else 12
    assert all(len(piece.operations) <= most for piece in way.pieces)
    again = recorded.Recorded(way, torch.arange(len(way.levels)))
    for index in range(len(way.levels)):
        again.seen(index, noise(0))
        again.step(index, noise(1), noise(2))
    assert again._values == {}


def test_they_are_those_of_one_state_and_shape() -> None:
    stepper = sampler("dpm++", VP)
    for _ in range(2):
        drawn(stepper, noise(0))
    ways = recorded._WAYS
    assert len(ways) == 1
    drawn(sampler("dpm++", VP), noise(0))  # another of the same
    assert len(ways) == 1
    drawn(stepper, noise(0, batch=1))
    drawn(stepper, noise(0).double())
    drawn(stepper, noise(0), begin=2)
    drawn(sampler("dpm++", scheduler_config(DiscreteVP(schedule="linear"), "v")), noise(0))
    assert len(ways) == 5
    betas = stepper.start(STEPS)
    betas.sigmas[1] *= 1.01  # no config says so
    stepper.run(betas, lambda *told: Prediction(*told[:2], told[0], "v"), noise(0), Condition())
    assert len(ways) == 6
    kinds = [type(way) for way in ways.values()]
    assert kinds == [recorded._Way] + [bool] * 5


def test_others_schedulers_and_tensors_are_not_recorded() -> None:
    class Mine(DDIMScheduler):
        pass

    scheduler = sampler("ddim", VP).start(STEPS)
    told = scheduler.timesteps, {"return_dict": False, "eta": 0.0, "generator": None}

    def kind(scheduler: Any, x: Tensor) -> type[Any]:
        found = [type(recorded.steps_of(scheduler, *told, x)) for _ in range(3)]
        assert found[0] is Steps and found[1] is found[2]  # nothing is published before the end
        return found[2]

    assert kind(scheduler, noise(0)) is recorded.Recording
    mine = Mine.from_config(scheduler.config)
    mine.set_timesteps(STEPS)
    assert kind(mine, noise(0)) is Steps
    assert kind(scheduler, torch.nn.Parameter(noise(0))) is Steps
    assert kind(scheduler, noise(0).to("meta")) is Steps
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(scheduler, noise(0)) is Steps
    scheduler.step = lambda *told, **named: None  # whose numbers nobody knows
    assert kind(scheduler, noise(0)) is Steps


def test_the_ways_that_are_kept_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_KEPT", 2)
    stepper = sampler("ddim", VP)
    for batch in (1, 2, 1, 3, 1):
        drawn(stepper, noise(0, batch))
    assert [key[2][0][0] for key in recorded._WAYS] == [3, 1]  # type: ignore[index]
    assert [type(way) for way in recorded._WAYS.values()] == [bool, recorded._Way]


def test_a_callback_sees_steps_of_the_scheduler_itself() -> None:
    pipe = LatentDiffusionPipeline(**tiny.components() | {"scheduler": tiny.scheduler()})
    pipe.set_progress_bar_config(disable=True)
    seen: list[int] = []

    def callback(pipe: Any, index: int, timestep: Tensor, tensors: Any) -> dict[str, Tensor]:
        seen.append(pipe.scheduler.step_index)
        return {}

    def pictures(**told: Any) -> Any:
        call = {"num_inference_steps": 3, "output_type": "latent", "sampler": "dpm++", "seed": 1}
        return pipe("a", **call, **told).images

    plain = [pictures() for _ in range(3)]
    called = [pictures(callback_on_step_end=callback) for _ in range(3)]
    assert any(isinstance(way, recorded._Way) for way in recorded._WAYS.values())
    assert seen == [1, 2, 3] * 3
    assert all(torch.equal(x, plain[0]) for x in plain + called)


@pytest.mark.parametrize("target", ["eps", "v", "x0", "velocity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_made_once_multiply_as_numbers_do(
    target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = DiscreteVP() if target == "eps" else RectifiedFlow(3.0)
    config = scheduler_config(process, target if target == "eps" else "velocity")
    x = noise(0).to(dtype)

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, (0.7 * x_t).sin(), target)

    cond = Condition(torch.zeros(2, 1, 1))
    guided = ClassifierFree(4.3)(predict, Condition(torch.ones(1, 1, 1)))
    t, s = (process.grid(STEPS)[i] for i in (1, 2))
    one, two = process.level(t), process.level(s)
    found = predict(x, one, t, cond)
    y_null, y_cond = found.y, found.y
    assert torch.equal(guided(x, one, t, cond).y, y_null + 4.3 * (y_cond - y_null))
    x0, eps = found.x0, found.eps
    euler = (float(two.alpha) * x0 + float(two.sigma) * eps).to(dtype)
    d_alpha, d_sigma = float(two.alpha - one.alpha), float(two.sigma - one.sigma)
    first = (d_alpha * x0 + d_sigma * eps).to(dtype)
    then = predict(x + first, two, s, cond)
    heun = x + (first + (d_alpha * then.x0 + d_sigma * then.eps).to(dtype)) / 2
    made: list[Any] = []
    of = System.of
    monkeypatch.setattr(System, "of", lambda *told: made.append(told) or of(*told))
    for name, want in (("ode-euler", euler), ("ode-heun", heun)):
        stepper = sampler(name, config)
        seen: list[Tensor] = []
        for _ in range(2):  # the second time what was made is used
            told = {"steps": STEPS, "denoising_start": 0.2, "denoising_end": 0.3}
            made.clear()
            seen.append(stepper(predict, x, cond, **told))
        assert made == []
        assert torch.equal(*seen) and seen[0].dtype == dtype
        assert torch.equal(seen[0], want)
