"""An exact denoiser of N(m, s^2) through every sampler, from the exact p_T, to the closed form.

With Gaussian data every step is affine in (x, noise), x <- A x + B + C xi, so the mean and the
variance of what a sampler returns follow from a batch of probes without any statistical error:
one sample from the mean of p_T, one a standard deviation above it, and for every draw of noise one
sample that gets noise 1 in that draw and 0 in all others.
"""

import itertools
import math
import sys
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Level,
    Prediction,
    Predictor,
    coefficients,
    scheduler_config,
)
from ldm.sampling import SAMPLERS, SchedulerSampler, sampler
from pushed import first_level
from turns import turns

# diffusers 0.42 under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
MEAN, STD = 0.7, 1.0
STEPS = (25, 50, 100, 200)


def exact(target: str) -> Predictor:
    """E[y | x_t] of N(MEAN, STD^2)."""

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        alpha, sigma, *_ = level.like(x_t)
        gain = 1 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        a, b = coefficients(target, Level(alpha, sigma))  # type: ignore[arg-type]
        y = a * (MEAN + alpha * STD**2 * gain) + b * sigma * gain
        return Prediction(x_t, level, y, target)  # type: ignore[arg-type]

    return predict


def named(name: str, target: str = "eps", **process: bool) -> SchedulerSampler:
    found = sampler(name, scheduler_config(DiscreteVP(**process), target))  # type: ignore[arg-type]
    assert isinstance(found, SchedulerSampler)
    return found


def push(which: SchedulerSampler, steps: int, target: str = "eps") -> tuple[float, float]:
    """Mean and standard deviation of the returned samples, exactly."""
    alpha, sigma, unit = first_level(which, steps)
    draws = which.evaluations(steps)
    x = torch.full((draws + 2, 1), alpha * MEAN / unit, dtype=torch.float64)
    x[1] += math.hypot(alpha * STD, sigma) / unit
    drawn = iter(range(2, draws + 2))

    def probe(shape: tuple[int, ...], dtype: torch.dtype, **_: object) -> Tensor:
        noise = torch.zeros(shape, dtype=dtype)
        noise[next(drawn)] = 1
        return noise

    cond = Condition(torch.zeros(draws + 2, 1, 1))
    with ExitStack() as stack:
        for name in [m for m in sys.modules if m.startswith("diffusers.schedulers.scheduling_")]:
            if "randn_tensor" in vars(sys.modules[name]):
                stack.enter_context(mock.patch.object(sys.modules[name], "randn_tensor", probe))
        x = which(exact(target), x, cond, steps=steps)
    return float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())


def closed_form(name: str) -> tuple[float, float]:
    """Mean and std where the sampler ends as steps go to infinity.

    ddim, ddpm, euler and euler-a reach sigma = 0, in a last step that becomes ever shorter. Those
    with even steps in log-SNR come to the first level of the table and jump to sigma = 0 from there
    at any number of steps, to x0_hat; PNDM stops at the first level.
    """
    first = DiscreteVP().table
    alpha, sigma = float(first.alpha[0]), float(first.sigma[0])
    if name in ("dpm++", "heun", "dpm2", "unipc"):
        return MEAN, STD**2 / math.hypot(STD, sigma / alpha)
    if name == "pndm":
        return alpha * MEAN, math.hypot(alpha * STD, sigma)
    return MEAN, STD


# Rates measured at std 1: log2 of the ratio of the errors at 25 and 50, 50 and 100, 100 and 200.
# First order comes as h log(1/h), because sigma grows as the square root of t at the clean end: the
# rates stay below 1 and rise.
MEASURED = {
    "ddim": (0.92, 0.93, 0.93),
    "ddpm": (0.81, 0.84, 0.86),
    "dpm++": (2.03, 2.03, 1.97),
    "euler": (0.92, 0.93, 0.93),
    "euler-a": (0.81, 0.84, 0.86),
    "heun": (2.11, 2.05, 2.03),
    "dpm2": (2.09, 2.04, 2.02),
    "unipc": (3.05, 3.04, 3.00),
}
DROP_ZERO = ("heun", "dpm2", "pndm")


@pytest.mark.parametrize("name", MEASURED)
def test_error_falls_at_the_declared_order(name: str) -> None:
    mean, std = closed_form(name)
    found = [push(named(name), steps) for steps in STEPS]
    errors = [abs(got - std) for _, got in found]
    rates = [math.log2(few / more) for few, more in itertools.pairwise(errors)]
    assert rates == pytest.approx(MEASURED[name], abs=0.03)
    assert all(SAMPLERS[name].order - 0.2 < rate < SAMPLERS[name].order + 0.15 for rate in rates)
    # Every sampler carries the mean over exactly, from the exact p_T: what is left is rounding.
    assert all(abs(got - mean) < 5e-6 for got, _ in found)


def test_pndm_is_second_order_and_then_its_short_last_step_shows() -> None:
    mean, std = closed_form("pndm")
    which = named("pndm")
    errors = [abs(push(which, steps)[1] - std) for steps in STEPS]
    assert SAMPLERS["pndm"].order == 2 and {*MEASURED, "pndm"} == {*SAMPLERS}
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.91, abs=0.03)
    # The step from timestep 1 to 0 is taken with coefficients for equal steps: no order from here.
    assert max(errors[2:]) < 1e-4
    assert abs(push(which, 50)[0] - mean) < 5e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("zero", [False, True])
def test_v_prediction_draws_alike_and_knows_zero_terminal_snr(name: str, zero: bool) -> None:
    if zero and name in DROP_ZERO:
        with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
            named(name, "v", zero_terminal_snr=zero)
        return
    _, std = closed_form(name)
    eps, v = push(named(name), 50), push(named(name, "v", zero_terminal_snr=zero), 50, "v")
    if not zero:
        assert v == pytest.approx(eps, abs=5e-6)
    assert v[0] == pytest.approx(MEAN, abs=4e-4)  # alpha is 0.9996 at the first level
    assert abs(v[1] - std) < 0.06


@pytest.mark.parametrize(("name", "speaks"), turns(SAMPLERS, ["v", "x0"]))
def test_the_network_may_speak_another_target_than_the_scheduler(name: str, speaks: str) -> None:
    which = named(name)
    assert push(which, 20, speaks) == pytest.approx(push(which, 20, "eps"), abs=2e-5)


@pytest.mark.parametrize("steps", [30, 35, 70, 333])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler"])
def test_steps_that_do_not_divide_the_table(name: str, steps: int) -> None:
    # Stock DDIM with trailing spacing ends its steps beside the next timestep: 6e-3 at 30 steps.
    assert push(named(name), steps)[0] == pytest.approx(MEAN, abs=1e-5)


def test_ddim_is_euler() -> None:
    for steps in (7, 30, 50):
        assert push(named("ddim"), steps) == pytest.approx(push(named("euler"), steps), abs=1e-5)


def test_even_log_snr_beats_trailing_for_dpm() -> None:
    config = named("dpm++").config
    for steps in (8, 10, 20, 50):
        lu = abs(push(named("dpm++"), steps)[1] - STD)
        other = {**config, "use_lu_lambdas": False}
        trailing = abs(push(SchedulerSampler(named("dpm++").scheduler, other), steps)[1] - STD)
        assert lu < trailing


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.stochastic])
def test_real_noise_has_the_variance_of_the_probes(name: str) -> None:
    which, samples, steps = named(name), 20_000, 25
    alpha, sigma, unit = first_level(which, steps)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(samples, 1, generator=draw)
    x = (alpha * MEAN + math.hypot(alpha * STD, sigma) * z) / unit
    cond = Condition(torch.zeros(samples, 1, 1))
    x = which(exact("eps"), x, cond, steps=steps, generators=draw)
    mean, std = push(which, steps)
    # Statistical error alone: 4 standard errors of a mean and of a standard deviation.
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(samples))
    assert float(x.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * samples))
