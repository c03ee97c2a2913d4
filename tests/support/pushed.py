"""What a process sampler makes of a distribution, without statistical error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from exact import GAUSSIAN, Mixture
from ldm.diffusion import (
    Condition,
    ContinuousVP,
    Cosine,
    DiscreteVP,
    Edm,
    Level,
    NoiseProcess,
    RectifiedFlow,
    Target,
    VarianceExploding,
)
from ldm.sampling import PROCESS_SAMPLERS, ProcessSampler, SchedulerSampler, process_sampler

CASES: dict[str, tuple[NoiseProcess, Target]] = {
    "discrete": (DiscreteVP(), "eps"),
    "zero": (DiscreteVP(zero_terminal_snr=True), "v"),
    "vp": (ContinuousVP(), "x0"),
    "cosine": (Cosine(), "v"),
    "ve": (VarianceExploding(), "score"),
    "edm": (VarianceExploding(0.002, 80), Edm(0.5)),
    "flow": (RectifiedFlow(), "velocity"),
    "shifted": (RectifiedFlow(3.0), "velocity"),
}


def legal() -> Iterator[tuple[str, str]]:
    """(process, sampler) of every pair that is not refused."""
    for case, (process, target) in CASES.items():
        for name, make in PROCESS_SAMPLERS.items():
            try:
                make(process, target, 0.0)
            except ValueError:
                continue
            yield case, name


def made(case: str, name: str) -> ProcessSampler:
    return PROCESS_SAMPLERS[name](*CASES[case], 0.0)


@contextmanager
def noise(draw: Callable[[tuple[int, ...]], Tensor]) -> Iterator[None]:
    """Every draw is ``draw(shape)``."""
    with mock.patch.object(process_sampler, "randn_tensor", lambda shape, *_: draw(shape)):
        yield


def run(which: ProcessSampler, data: Mixture, x: Tensor, steps: int, **ends) -> Tensor:
    cond = Condition(torch.zeros(len(x), 1, 1))
    return which(data.predictor(which.target), x, cond, steps=steps, **ends)


def at(process: NoiseProcess, u: float) -> Level:
    """Level at ``u`` of the sampler's clock."""
    return process.level(process.grid(1, u)[0])


def first_level(which: SchedulerSampler, steps: int) -> tuple[float, float, float]:
    """(alpha, sigma) at which ``which`` starts and the network's x_t for noise x = 1."""
    scheduler = which.start(steps)
    timestep = scheduler.timesteps[0]
    one = torch.ones(1, dtype=torch.float64) * scheduler.init_noise_sigma
    unit = float(scheduler.scale_model_input(one, timestep))
    level = which.level(scheduler, timestep)
    return float(level.alpha), float(level.sigma), unit


def gaussian(which: ProcessSampler, steps: int, **ends) -> tuple[float, float]:
    """Mean and standard deviation of what becomes of p_T of ``exact.GAUSSIAN``.

    Steps are affine in (x, noise): one sample from the mean of p_T, one a standard deviation above
    it, and one for every draw of noise that gets noise 1 in that draw alone.
    """
    alpha, sigma = (float(part) for part in at(which.process, 1.0)[:2])
    mean, std = float(GAUSSIAN.mean[0]), float(GAUSSIAN.cov[0, 0]) ** 0.5
    ends = {"start": 1.0, "stop": 0.0, **ends}
    draws: list[int] = []

    def count(shape: tuple[int, ...]) -> Tensor:
        draws.append(len(draws) + 2)
        return torch.zeros(shape, dtype=torch.float64)

    x = torch.full((2, 1), alpha * mean, dtype=torch.float64)
    x[1] += math.hypot(alpha * std, sigma)
    with noise(count):
        got = run(which, GAUSSIAN, x, steps, **ends)
    if not draws:
        return float(got[0]), float((got[1] - got[0]).abs())
    x = torch.cat([x, x[:1].repeat(len(draws), 1)])
    left = iter(draws)

    def probe(shape: tuple[int, ...]) -> Tensor:
        z = torch.zeros(shape, dtype=torch.float64)
        z[next(left)] = 1
        return z

    with noise(probe):
        x = run(which, GAUSSIAN, x, steps, **ends)
    return float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())


def nodes(data: Mixture, reach: float, points: int) -> tuple[Tensor, Tensor]:
    """(x, weight) of the trapezoidal rule for ``data``, on a grid around it."""
    d = len(data.mean)
    std = data.cov.diagonal().max().sqrt()
    axes = [float(m) + std * torch.linspace(-reach, reach, points).double() for m in data.mean]
    x = torch.cartesian_prod(*axes).reshape(-1, d)
    weight = data.log_prob(x, Level(*torch.eye(2).double()[0])).exp()
    return x, weight / weight.sum()


def apart(x: Tensor, weight: Tensor, data: Mixture) -> Tensor:
    """Errors of mean, covariance and component weights of weighted points against ``data``."""
    pure = Level(*torch.eye(2).double()[0])
    mean = weight @ x
    cov = (weight[:, None] * (x - mean)).T @ (x - mean)
    share = weight @ data.responsibilities(x, pure)
    return torch.stack(
        [
            (mean - data.mean).abs().max(),
            (cov - data.cov).abs().max(),
            (share - data.weights).abs().max(),
        ]
    )
