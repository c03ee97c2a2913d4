"""Exact denoisers of mixtures through the schedulers: every named sampler that runs the process.

Those that follow the ODE are compared node by node with where the ODE leads; those that draw noise
by the moments of 40,000 samples, whose statistical error stands apart.
"""

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from exact import CORRELATED, MIXTURE, PURE, Mixture
from ldm.diffusion import Condition, scheduler_config
from ldm.sampling import SAMPLERS, SchedulerSampler, sampler
from pushed import CASES, at, first_level, made, nodes, run

# diffusers 0.42 under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
DATA = {"mixture": (MIXTURE, 1000), "correlated": (CORRELATED, 30)}


# What a scheduler runs, and of it what is refused; that they are, the first test asks.
SCHEDULED = ("discrete", "zero", "vp", "cosine")
REFUSED = {(case, name) for case in ("zero", "cosine") for name in ("heun", "dpm2", "pndm")}


def legal(*, stochastic: bool) -> list[tuple[str, str]]:
    """(process, sampler) of every pair that a scheduler runs."""
    return [
        (case, name)
        for case in SCHEDULED
        for name, row in SAMPLERS.items()
        if row.stochastic == stochastic and (case, name) not in REFUSED
    ]


def asked(*, stochastic: bool) -> list[Any]:
    """(process, sampler, data) of those. The schedulers know processes by their tables: in two
    dimensions one is enough, and on a line one of two that begin and end alike; others are slow.
    """
    return [
        pytest.param(case, name, data, marks=[pytest.mark.slow] if slow else [])
        for case, name in legal(stochastic=stochastic)
        for data in DATA
        for slow in [case == "vp" or (data == "correlated" and case != "discrete")]
    ]


def test_what_is_legal() -> None:
    found = set()
    for case, (process, target) in CASES.items():
        for name in SAMPLERS:
            try:
                which = sampler(name, scheduler_config(process, target))
            except ValueError:
                continue
            if isinstance(which, SchedulerSampler):
                found.add((case, name))
    assert found == {*legal(stochastic=False), *legal(stochastic=True)}


@cache
def named(case: str, name: str) -> SchedulerSampler:
    process, target = CASES[case]
    found = sampler(name, scheduler_config(process, target))
    assert isinstance(found, SchedulerSampler)
    return found


def drawn(case: str, name: str, data: Mixture, x: Tensor, steps: int, **kwargs) -> Tensor:
    """What becomes of ``x`` of p_T, in the units of the process."""
    which = named(case, name)
    *_, unit = first_level(which, steps)
    cond = Condition(torch.zeros(len(x), 1, 1))
    return which(data.predictor(CASES[case][1]), x / unit, cond, steps=steps, **kwargs)


@cache
def led(case: str, data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of p_T, their weights and where the ODE leads them."""
    mixture, points = DATA[data]
    x, weight = nodes(mixture.noised(*at(CASES[case][0], 1.0)[:2]), 6.0, points)
    # stop=None: as the schedulers end, with x0_hat of the first level.
    return x, weight, run(made(case, "ode-adaptive"), mixture, x, 10, start=1.0, stop=None)


@pytest.mark.parametrize("case, name, data", asked(stochastic=False))
def test_along_the_ode(case: str, name: str, data: str) -> None:
    x, weight, goal = led(case, data)

    def error(steps: int) -> float:
        """Mean distance to where the ODE leads; no error of a mean or of a weight is larger."""
        got = drawn(case, name, DATA[data][0], x, steps)
        return float(weight @ (got - goal).abs().sum(1))

    if name == "pndm":  # its start is not p_T but a level below, and its last step of no order
        assert error(40) < 4e-3
        return
    errors = [error(20), error(40), error(80)]
    rates = [math.log2(few / more) for few, more in itertools.pairwise(errors)]
    order = SAMPLERS[name].order
    assert all(order - 0.2 < rate < order + 0.2 for rate in rates)


@pytest.mark.parametrize("case, name, data", asked(stochastic=True))
def test_with_noise(case: str, name: str, data: str) -> None:
    mixture, count = DATA[data][0], 40_000
    x = mixture.noised(*at(CASES[case][0], 1.0)[:2]).sample(count, seed=1)

    def off(steps: int) -> Tensor:
        """Errors of means, of the covariance and of the weights."""
        draw = torch.Generator().manual_seed(2)
        got = drawn(case, name, mixture, x, steps, generators=draw).double()
        share = mixture.responsibilities(got, PURE).mean(0)
        parts = (got.mean(0) - mixture.mean, got.T.cov() - mixture.cov, share - mixture.weights)
        return torch.cat([part.flatten() for part in parts]).abs()

    few, more = off(8), off(32)
    statistical = 4 * mixture.cov.max() * math.sqrt(2 / count)  # four standard errors of a variance
    assert 0.7 < float((few.max() / more.max()).log2()) / 2 < 1.05  # the largest is a variance's
    assert bool((more < 0.45 * few + statistical).all())
