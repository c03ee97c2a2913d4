"""Exact denoisers through every process and every sampler that is legal for it, to closed forms.

What is left at a finite number of steps is the sampler's error alone: Gaussians go through as
affine maps, mixtures as quadrature nodes along the ODE or as densities on a grid; nothing is drawn.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from exact import CORRELATED, GAUSSIAN, MIXTURE, PURE, Mixture
from ldm.sampling import ProcessSampler
from pushed import CASES, apart, at, gaussian, legal, made, nodes, noise, run

PAIRS = list(legal())
MEAN, STD = 0.7, 1.2
STEPS = (20, 40, 80)


def rates(errors: list[float]) -> list[float]:
    return [math.log2(few / more) for few, more in itertools.pairwise(errors)]


def test_what_is_legal() -> None:
    always = {"ode-euler", "ode-heun", "ode-adaptive", "ancestral", "pc"}
    for case in CASES:
        extra = {"discrete": {"sde"}, "vp": {"sde"}, "ve": {"sde", "langevin"}}
        extra["edm"] = extra["ve"]
        assert {name for c, name in PAIRS if c == case} == always | extra.get(case, set())
    with pytest.raises(ValueError, match="infinite at t = 1, where alpha = 0: use .* 'ancestral'"):
        made("flow", "sde")
    with pytest.raises(ValueError, match="'vp' scales it: use sampler 'pc'"):
        made("vp", "langevin")


# -- Gaussians --

# How far log2 of the ratio of the errors at 20 and 40, 40 and 80 steps may be from the order.
# ancestral: h log(1/h) at the clean end, as of the schedulers. sde: on VE the first-order errors of
# the drift and of the noise cancel. langevin, pc: corrections mend more of what fewer steps left.
LOW, HIGH = {"ancestral": -0.2, "pc": -0.1}, {"pc": 0.35, "langevin": 0.55, "ode-heun": 0.25}
EXACT_MEAN = {"ode-euler", "ode-heun", "ancestral", "pc", "langevin"}


@pytest.mark.parametrize("case, name", PAIRS)
def test_error_falls_at_the_declared_order(case: str, name: str) -> None:
    which = made(case, name)
    level = at(which.process, 0.0)
    mean = float(level.alpha) * MEAN
    std = math.hypot(float(level.alpha) * STD, float(level.sigma))
    if name == "ode-adaptive":
        assert gaussian(which, 10) == pytest.approx((mean, std), abs=5e-6)
        return
    # That it stays the order is asked of one process.
    steps = STEPS if case == "vp" and name != "langevin" else STEPS[:2]
    found = [gaussian(which, count) for count in steps]
    order = which.order + (name == "sde" and case in ("ve", "edm"))
    for rate in rates([abs(got - std) for _, got in found]):
        assert order + LOW.get(name, -0.1) < rate < order + HIGH.get(name, 0.1)
    if name in EXACT_MEAN:
        assert all(abs(got - mean) < 1e-12 for got, _ in found)
    elif case not in ("ve", "edm"):
        assert all(0.9 < rate < 2 for rate in rates([abs(got - mean) for got, _ in found]))


@pytest.mark.parametrize("case", CASES)
def test_the_last_step_is_the_denoiser(case: str) -> None:
    # x0_hat of x_t at the first node: less spread than the data, by a closed form.
    which = made(case, "ode-adaptive")
    level = at(which.process, 0.0)
    ratio = float(level.sigma / level.alpha)
    expected = (MEAN, STD**2 / math.hypot(STD, ratio))
    assert gaussian(which, 10, stop=None) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_bias_of_pure_noise_is_the_closed_form(case: str) -> None:
    # The flow takes quantiles to quantiles: x_T of N(alpha m, S_T) to the data's. Noise begins at
    # the mean 0 and the standard deviation that data of unit variance have there.
    which = made(case, "ode-adaptive")
    end, level = at(which.process, 1.0), at(which.process, 0.0)
    begin = math.hypot(float(end.alpha) * STD, float(end.sigma))
    shrink = math.hypot(float(level.alpha) * STD, float(level.sigma)) / begin
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    low, high = run(which, GAUSSIAN, x, 10, stop=0.0)[:, 0].tolist()
    bias = -shrink * float(end.alpha) * MEAN
    assert low == pytest.approx(float(level.alpha) * MEAN + bias, abs=1e-5)
    assert high - low == pytest.approx(shrink * which.process.prior_std(), abs=1e-5)
    if case == "discrete":
        assert bias == pytest.approx(-0.0572, abs=1e-4)  # no rounding, but a picture's brightness
    if case in ("zero", "cosine", "flow", "shifted"):
        assert bias == 0


# -- mixtures, along the ODE --


def others(case: str) -> list[pytest.MarkDecorator]:
    """What marks a process as slow that is another one with other numbers: the Gaussians and the
    mixture on a line are asked of it.
    """
    return [pytest.mark.slow] if case in ("zero", "edm", "shifted") else []


# Nodes an axis, and what the quadrature leaves of mean, covariance and weights.
DATA = {
    "mixture": (MIXTURE, 1500, (4e-5, 5e-5, 3e-4)),
    "correlated": (CORRELATED, 30, (4e-3, 3e-3, 1.2e-2)),
}


@pytest.mark.parametrize(
    "name, case",
    [
        *(("mixture", case) for case in CASES),
        *(pytest.param("correlated", case, marks=others(case)) for case in CASES),
    ],
)
def test_mixtures_along_the_ode(name: str, case: str) -> None:
    data, points, left = DATA[name]
    process = CASES[case][0]
    begin, end = (data.noised(*at(process, u)[:2]) for u in (1.0, 0.0))
    x, weight = nodes(begin, 6.0, points)
    goal = run(made(case, "ode-adaptive"), data, x, 10, start=1.0, stop=0.0)
    assert bool((apart(goal, weight, end) < torch.tensor(left)).all())
    for sampler, lowest in (("ode-euler", 0.85), ("ode-heun", 1.6)):
        which = made(case, sampler)

        def error(steps: int, which: ProcessSampler = which) -> float:
            """Mean distance to where the ODE leads; no error of a mean or of a weight is larger."""
            found = run(which, data, x, steps, start=1.0, stop=0.0)
            return float(weight @ (found - goal).abs().sum(1))

        assert all(lowest < rate < which.order + 0.3 for rate in rates([error(10), error(20)]))


def test_what_the_quadrature_leaves_falls_with_its_nodes() -> None:
    process = CASES["flow"][0]
    begin, end = (CORRELATED.noised(*at(process, u)[:2]) for u in (1.0, 0.0))
    x, weight = nodes(begin, 6.0, 90)
    goal = run(made("flow", "ode-adaptive"), CORRELATED, x, 10, start=1.0, stop=0.0)
    assert float(apart(goal, weight, end).max()) < 1e-3


# -- mixtures, with noise: the density goes from grid to grid --


def propagated(which: ProcessSampler, data: Mixture, steps: int, stop: float) -> Tensor:
    """Errors of mean, variance and weights after ``steps`` steps to time ``stop``."""
    times = which.process.grid(steps + 1, 1.0, stop)
    u = torch.linspace(1, stop, steps + 1).tolist()
    x, weight = nodes(data.noised(*which.process.level(times[0])[:2]), 7.0, 500)
    for start, end, s in zip(u[:-1], u[1:], times[1:], strict=True):
        with noise(lambda shape: torch.zeros(shape, dtype=torch.float64)):
            mean = run(which, data, x, 1, start=start, stop=end)
        with noise(lambda shape: torch.ones(shape, dtype=torch.float64)):
            width = (run(which, data, x, 1, start=start, stop=end) - mean)[0]
        y, _ = nodes(data.noised(*which.process.level(s)[:2]), 7.0, 500)
        kernel = (-(((y - mean.T) / width) ** 2) / 2).exp()
        x, weight = y, kernel @ weight
        weight = weight / weight.sum()
    return apart(x, weight, data.noised(*which.process.level(times[-1])[:2]))


@pytest.mark.parametrize(
    "case, name", [pair for pair in PAIRS if pair[1] in ("sde", "ancestral") and pair[0] != "edm"]
)
def test_mixtures_with_noise(case: str, name: str) -> None:
    which = made(case, name)
    # Where sigma is half of alpha: grids of the clean end would have to be as fine as its noise.
    t = float(which.process.time_at(torch.tensor(2 * math.log(2.0))))
    stop = t if case != "shifted" else t / (3 - 2 * t)
    few, more = (propagated(which, MIXTURE, steps, stop) for steps in (16, 32))
    rate = (few / more).log2()
    assert 0.75 < float(rate.min()) and float(rate.max()) < (2 if name == "sde" else 1.05)
    assert float(more.max()) < 0.15


@pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(case, name, marks=others(case))
        for case, name in PAIRS
        if name in ("sde", "ancestral", "pc", "langevin")
    ],
)
def test_the_correlated_mixture_with_noise(case: str, name: str) -> None:
    """By the moments of 5,000 samples: their statistical error stands apart."""
    which, count, steps = made(case, name), 5000, 64 if name == "langevin" else 32
    x = CORRELATED.noised(*at(which.process, 1.0)[:2]).sample(count, seed=1)
    draw = torch.Generator().manual_seed(2)
    got = run(which, CORRELATED, x, steps, start=1.0, stop=0.0, generators=draw).double()
    goal = CORRELATED.noised(*at(which.process, 0.0)[:2])
    weights = goal.responsibilities(got, PURE).mean(0)
    sigmas = 4 / math.sqrt(count)
    largest = float(goal.cov.max())
    assert float((got.mean(0) - goal.mean).abs().max()) < 0.03 + sigmas * math.sqrt(largest)
    assert float((got.T.cov() - goal.cov).abs().max()) < 0.2 + sigmas * math.sqrt(2) * largest
    assert float((weights - goal.weights).abs().max()) < 0.01 + sigmas * 0.5
