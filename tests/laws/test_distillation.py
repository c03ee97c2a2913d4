"""Distillation on an exact Gaussian: what a perfect student would say, and where it would end."""

import pytest
import torch
from torch import Tensor

from exact import _mixture
from ldm.diffusion import (
    Condition,
    Cosine,
    DiscreteVP,
    Level,
    NoiseProcess,
    Prediction,
    Predictor,
    RectifiedFlow,
    Target,
    coefficients,
    predictor,
)
from ldm.diffusion.distil import (
    ConsistencyDistillation,
    GuidanceDistillation,
    ProgressiveDistillation,
    Reflow,
    boundary,
    nodes,
    one_step,
    step,
)

MEAN, STD = 0.7, 0.5
GAUSSIAN = _mixture([1.0], [[MEAN]], [[[STD**2]]])
NOTHING = Condition()
PROCESSES = {"v": Cosine(), "x0": DiscreteVP(), "eps": DiscreteVP(), "velocity": RectifiedFlow()}
COUNT = 400


def draws(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise, and one ``u`` in the middle of each of many cells."""
    draw = torch.Generator().manual_seed(seed)
    z, eps = (torch.randn(COUNT, 1, generator=draw, dtype=torch.float64) for _ in range(2))
    return MEAN + STD * z, eps, (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT


def ended(process: NoiseProcess, predict: Predictor, steps: int) -> tuple[float, float]:
    """Mean and standard deviation of what DDIM in ``steps`` makes of N(0, 1): all is affine."""
    x, times = torch.tensor([[0.0], [1.0]], dtype=torch.float64), nodes(process, steps)
    for k in range(steps, 0, -1):
        t, s = times[k].expand(2), times[k - 1].expand(2)
        x = step(process, predict, x, t, s, NOTHING)
    return float(x[0]), float(x[1] - x[0])


def student_of(process: NoiseProcess, teacher: Predictor, steps: int, target: Target) -> Predictor:
    """Says exactly what progressive distillation in ``steps`` asks of it."""
    asked: dict[str, Tensor] = {}
    learns = ProgressiveDistillation(target=target, teacher=teacher, steps=steps)

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        t = (timestep + 1) / process.num_train_timesteps
        twice = nodes(process, 2 * steps)
        first = torch.searchsorted(twice, t - 1e-9) - 2
        s, middle = twice[first], twice[first + 1]
        x_m = step(process, teacher, x_t, t, middle, cond)
        x_s = step(process, teacher, x_m, middle, s, cond)
        here = process.level(t).like(x_t)
        x0 = one_step(x_t, x_s, here, process.level(s).like(x_t))
        a, b = coefficients(target, here)
        y = a * x0 + b * (x_t - here.alpha * x0) / here.sigma
        asked["y"] = y
        return Prediction(x_t, level, y, target)

    # The objective asks for the same, to rounding.
    z, eps, u = draws()
    terms = learns(
        process,
        lambda x, timestep, cond: predict(x, process.at(timestep), timestep, cond).y,
        z,
        NOTHING,
        u=u,
        eps=eps,
    )
    assert float(terms.mse.max()) < 1e-20 and len(terms.t.unique()) == steps
    return predict


@pytest.mark.parametrize("target", PROCESSES)
def test_one_step_of_the_student_is_two_of_the_teacher(target: Target) -> None:
    process, teacher = PROCESSES[target], GAUSSIAN.predictor(target)
    x, eps, _ = draws()
    twice = nodes(process, 16)
    for k in (16, 8, 2):
        t, middle, s = (twice[at].expand(COUNT) for at in (k, k - 1, k - 2))
        x_t = process.perturb(x, eps, t)
        level, after = process.level(t).like(x), process.level(s).like(x)
        x_m = step(process, teacher, x_t, t, middle, NOTHING)
        x_s = step(process, teacher, x_m, middle, s, NOTHING)
        x0 = one_step(x_t, x_s, level, after)
        there = after.alpha * x0 + after.sigma * (x_t - level.alpha * x0) / level.sigma
        assert float((there - x_s).abs().max()) < 1e-12


def test_a_chain_of_students_ends_in_one_step_where_sixteen_do() -> None:
    process, predict = Cosine(), GAUSSIAN.predictor("v")
    spread = [ended(process, predict, n)[1] for n in (1, 2, 4, 8, 16)]
    assert spread == pytest.approx([0.0, 0.200, 0.333, 0.411, 0.454], abs=6e-4)
    for steps in (8, 4, 2, 1):
        predict = student_of(process, predict, steps, "v")
    mean, std = ended(process, predict, 1)
    assert abs(mean - MEAN) < 1e-9 and abs(std - 0.454) < 0.002


def true_end(x_t: Tensor, level: Level, *_: object) -> Prediction:
    """Where the exact ODE through ``x_t`` ends."""
    at = level.like(x_t)
    std = (at.alpha**2 * STD**2 + at.sigma**2).sqrt()
    return Prediction(x_t, level, MEAN + STD * (x_t - at.alpha * MEAN) / std, "x0")


def residual(process: NoiseProcess, steps: int, **how: str) -> float:
    """How far apart the loss finds the ends that the exact consistency function tells."""
    teacher = GAUSSIAN.predictor("v")
    learns = ConsistencyDistillation(target="x0", teacher=teacher, steps=steps, huber=None, **how)
    z, eps, u = draws()

    def said(x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return true_end(x, process.at(timestep)).y

    return float(learns(process, said, z, NOTHING, u=u, eps=eps).mse.sqrt().mean())


@pytest.mark.parametrize("process", [DiscreteVP(), Cosine()], ids=lambda p: p.kind)
def test_the_exact_consistency_function_is_left_with_the_error_of_a_step(process) -> None:
    # Skips of 20 and of 5 of 1,000 timesteps: a step of first order.
    coarse, fine = residual(process, 50), residual(process, 200)
    assert coarse / fine > 14 and coarse < 1e-3
    assert residual(process, 50, solver="heun") < coarse / 10


def test_a_student_fits_the_ends_only_if_it_ends_there() -> None:
    process = DiscreteVP()
    c_skip, c_out = boundary(process, torch.tensor([1.0, 20.0, 1000.0]).double() / 1000)
    assert (float(c_skip[0]), float(c_out[0])) == pytest.approx((1, 0), abs=1e-12)
    assert float(c_skip[1]) < 1e-5 and float(1 - c_out[1]) < 1e-5
    z, eps, u = draws()
    learns = ConsistencyDistillation(target="x0", teacher=true_end, steps=50, solver="pair")
    # Of pairs the far end alone is wrong: a network that says 0 is told so, and Huber weakens it.
    nothing = learns(process, lambda x, *_: 0 * x, z, NOTHING, u=u, eps=eps)
    first = u < 1 / 50
    assert float(nothing.mse[~first].max()) < 1e-9 and float(nothing.mse[first].min()) > 1e-6
    assert bool((nothing.loss <= nothing.mse.sqrt() + 1e-12).all())


def test_a_student_of_guidance_is_asked_what_the_teacher_says() -> None:
    process, teacher = DiscreteVP(), GAUSSIAN.predictor("eps")
    z, eps, u = draws()
    learns = GuidanceDistillation(target="v", teacher=teacher)

    def said(x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return teacher(x, process.at(timestep), timestep, cond).as_("v")

    assert float(learns(process, said, z, NOTHING, u=u, eps=eps).mse.max()) < 1e-24


def test_a_flow_of_pairs_is_straight() -> None:
    """The pairs of an exact flow are a map, affine here: one step of what fits them is exact."""
    process, teacher = RectifiedFlow(), GAUSSIAN.predictor("velocity")
    z, eps, u = draws()
    learns = Reflow(target="velocity", teacher=teacher, steps=64, solver="heun")
    fits = MEAN + STD * eps  # where the exact flow brings the noise
    slope = eps - fits
    terms = learns(process, lambda x, *_: slope, torch.zeros_like(z), NOTHING, u=u, eps=eps)
    assert float(terms.mse.mean()) < 1e-6
    plain = predictor(lambda x, *_: slope, "velocity")
    there = step(process, plain, eps, torch.ones(COUNT), torch.zeros(COUNT), NOTHING)
    assert float((there - fits).abs().max()) < 1e-12
