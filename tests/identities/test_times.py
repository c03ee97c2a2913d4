"""Every sampler of times: its density, its importance weight, its state."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.diffusion import (
    ContinuousVP,
    Cosine,
    DiscreteVP,
    NoiseProcess,
    RectifiedFlow,
    VarianceExploding,
    stratified,
)
from ldm.diffusion.times import (
    InverseVariance,
    LogitNormal,
    LogNormal,
    LossSecondMoment,
    Mode,
    TimeSampler,
    Uniform,
)


def filled(cells: int = 20) -> LossSecondMoment:
    times = LossSecondMoment(cells, history=3)
    for turn in range(3):
        t = [(cell + 0.5) / cells for cell in range(cells)]
        times.update(t, [(1 + turn) * math.exp(-5 * x) for x in t])
    return times


SAMPLERS: dict[str, TimeSampler] = {
    "uniform": Uniform(),
    "inverse variance": InverseVariance(t_min=1e-3),
    "loss second moment": filled(),
    "logit normal": LogitNormal(-0.3, 1.2),
    "log normal": LogNormal(),
    "mode": Mode(1.29),
    "mode, other way": Mode(-0.8),
}
PROCESSES: list[NoiseProcess] = [
    DiscreteVP(),
    ContinuousVP(),
    Cosine(),
    VarianceExploding(),
    RectifiedFlow(),
    RectifiedFlow(3.0),
]
FUNCTIONS = [
    lambda t: torch.ones_like(t),
    lambda t: t,
    lambda t: (7 * t).sin(),
    lambda t: (t > 0.4).double(),
]


TRUNCATED = [(0.0, 0.2), (0.2, 1.0), (0.35, 0.6)]


def within(name: str, low: float, high: float) -> TimeSampler:
    """A sampler of ``SAMPLERS`` on [low, high]."""
    if name != "loss second moment":
        return replace(SAMPLERS[name], low=low, high=high)
    times = LossSecondMoment(20, history=3, low=low, high=high)
    for turn in range(3):
        t = [low + (high - low) * (cell + 0.5) / 20 for cell in range(20)]
        times.update(t, [(1 + turn) * math.exp(-5 * x) for x in t])
    return times


def times_of(batch: int, count: int = 1) -> Tensor:
    return torch.stack([torch.from_numpy(stratified(0, "time", n, batch)) for n in range(count)])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.kind} {getattr(p, 'shift', '')}")
@pytest.mark.parametrize("name", SAMPLERS)
def test_importance_weights_give_the_uniform_expectation(name: str, process: NoiseProcess) -> None:
    sampler = SAMPLERS[name]
    # 64 batches of 4,096: their means differ by the statistical error.
    t, weight = sampler(times_of(4096, 64), process)
    assert t.shape == weight.shape == (64, 4096) and t.dtype == torch.float64
    assert bool(((t >= 0) & (t <= 1)).all()) and bool((weight > 0).all())
    low = float(process.time(torch.tensor(1e-3))) if name == "inverse variance" else 0.0
    first = process.level(torch.zeros(())).logsnr
    grid = low + (1 - low) * (torch.arange(200_000).double() + 0.5) / 200_000
    for f in FUNCTIONS:
        exact = float(f(grid).mean()) * (1 - low)
        means = (weight * f(t)).mean(1)
        error = 5 * float(means.std()) / 8 + 1e-3  # the cells of a table are 1e-3
        # The far tails of a normal are a part of the integral that no batch of this size meets.
        error += 0.02 if "normal" in name else 0.0
        assert float(means.mean()) == pytest.approx(exact, abs=error), (name, first)


def test_densities_are_those_of_their_papers() -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    flow = RectifiedFlow()
    t, over_p = LogitNormal(-0.3, 1.2)(u, flow)
    z = (torch.logit(t) + 0.3) / 1.2
    normal = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi) / 1.2
    assert torch.allclose(1 / over_p, normal / (t * (1 - t)), rtol=1e-9)
    # log(sigma / alpha) is logit(t) on a rectified flow: one sampler under two names.
    again, same = LogNormal(-0.3, 1.2)(u, flow)
    assert torch.allclose(again, t) and torch.allclose(same, over_p)
    # EDM's, with the 1e-5 of its mass outside of sigma_min to sigma_max taken from the tails.
    edm = VarianceExploding(0.002, 80)
    t, _ = LogNormal()(u, edm)
    exact = -1.2 + 1.2 * torch.special.ndtri(u)
    assert torch.allclose(edm.level(t).sigma.log(), exact, atol=1e-3)
    # Mode: eq. 20, whose slope at u = 1/2 is 1 + scale - scale pi / 2.
    t, over_p = Mode(1.29)(torch.tensor([0.5]), flow)
    assert float(t) == pytest.approx(0.5) and float(over_p) == pytest.approx(
        abs(-1 - 1.29 + 1.29 * math.pi / 2)
    )
    # Proportional to 1 / sigma^2, cell by cell.
    for process in (ContinuousVP(), VarianceExploding(), DiscreteVP()):
        t, over_p = InverseVariance(t_min=1e-4)(u, process)
        product = process.level(t).sigma ** 2 / over_p
        assert float(product.std() / product.mean()) < 0.03


def test_a_batch_is_stratified_in_probability() -> None:
    for name, sampler in SAMPLERS.items():
        t, _ = sampler(times_of(500)[0], ContinuousVP())
        # The k-th smallest lies in the k-th cell of equal probability.
        edges, _ = sampler(torch.linspace(0, 1, 501, dtype=torch.float64), ContinuousVP())
        low, high = edges.sort().values[:-1], edges.sort().values[1:]
        found = t.sort().values
        assert bool(((found >= low - 1e-9) & (found <= high + 1e-9)).all()), name


def test_discrete_times_are_nodes_and_unbiased() -> None:
    for sampler in SAMPLERS.values():
        t, _ = sampler(times_of(1000)[0], DiscreteVP())
        assert torch.allclose(t * 1000, (t * 1000).round(), atol=1e-9)


def test_second_moment_is_uniform_until_every_cell_is_full() -> None:
    times, u = LossSecondMoment(4, history=2), times_of(64)[0]
    for turn in range(2):
        assert torch.equal(times(u, ContinuousVP())[0], u)
        times.update([0.1, 0.4, 0.6, 1.0], [4.0, 2.0, 1.0, 4.0 * turn])
    t, weight = times(u, ContinuousVP())
    root = torch.tensor([4, 2, 1, math.sqrt(8)]).double()
    share = torch.histc(t, 4, 0, 1) / 64
    assert torch.allclose(share, root / root.sum(), atol=1.5 / 64)
    assert float(weight.mean()) == pytest.approx(1, abs=0.02)
    times.update([0.1] * 2, [0.0, math.nan])  # what is not finite is forgotten
    assert list(times.losses[0]) == [4.0, 0.0]
    times.update([0.1], [3.0])
    assert list(times.losses[0]) == [0.0, 3.0]


def test_state_is_no_part_of_the_config() -> None:
    assert filled() == LossSecondMoment(20, history=3)
    assert LossSecondMoment().losses[0] is not LossSecondMoment().losses[0]


# -- [low, high] --


def density(name: str, low: float, high: float, process: NoiseProcess) -> Tensor:
    """Sorted times of the whole sampler that fall into [low, high], of even u."""
    u = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 300_000
    whole = SAMPLERS[name]
    if isinstance(whole, LossSecondMoment):  # whose cells are those of [low, high]
        found = within(name, low, high).inverse_cdf(u, process)
    else:
        found = whole.inverse_cdf(u, process)
    found = process.time(found[(found >= low) & (found < high)]).sort().values
    assert len(found) > 600
    return found


@pytest.mark.parametrize("process", [DiscreteVP(), VarianceExploding(0.1, 5), RectifiedFlow(3.0)],
                         ids=lambda p: p.kind)  # fmt: skip
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("low", "high"), TRUNCATED)
def test_times_between_two_are_those_of_the_whole_density(
    name: str, low: float, high: float, process: NoiseProcess
) -> None:
    exact = density(name, low, high, process)
    t, weight = within(name, low, high)(times_of(40_000)[0], process)
    first, last = process.time(torch.tensor([low, high - 1e-9], dtype=torch.float64))
    assert float(first) <= float(t.min()) and float(t.max()) <= float(last)
    # Kolmogorov and Smirnov's distance, at every time that either has.
    points = torch.cat([t, exact])
    shares = [
        torch.searchsorted(x.sort().values, points, right=True).double() / len(x)
        for x in (t, exact)
    ]
    assert float((shares[0] - shares[1]).abs().max()) < 0.005
    # Weights make the mean that over uniform t in [low, high].
    least = max(low, 1e-3) if name == "inverse variance" else low
    fraction = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    ends = torch.tensor([low, least, high], dtype=torch.float64)
    ends = ends if process.kind == "discrete" else process.time(ends)
    start, cut, stop = ends.tolist()
    grid = cut + (stop - cut) * fraction
    for f in FUNCTIONS:
        exactly = float(f(grid).mean()) * (stop - cut) / (stop - start)
        # The far tails of a normal are a part of the integral that no batch meets.
        tails = 0.03 if "normal" in name else 0.006
        assert float((weight * f(t)).mean()) == pytest.approx(exactly, abs=tails)


@pytest.mark.parametrize("name", SAMPLERS)
def test_cdf_is_the_inverse_of_the_inverse(name: str) -> None:
    for process in (ContinuousVP(), DiscreteVP(), VarianceExploding()):
        sampler, u = SAMPLERS[name], times_of(1000)[0].clamp(1e-3, 1 - 1e-3)
        assert torch.allclose(sampler.cdf(sampler.inverse_cdf(u, process), process), u, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_between_two_are_stratified(name: str) -> None:
    sampler, process = within(name, 0.1, 0.3), ContinuousVP()
    t, _ = sampler(times_of(500)[0], process)
    edges, _ = sampler(torch.linspace(0, 1, 501, dtype=torch.float64), process)
    edges, found = edges.sort().values, t.sort().values
    assert bool(((found >= edges[:-1] - 1e-9) & (found <= edges[1:] + 1e-9)).all())
    assert float(edges[0]) == pytest.approx(0.1) and float(edges[-1]) == pytest.approx(0.3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_whole_is_what_it_was(name: str) -> None:
    sampler, process = SAMPLERS[name], ContinuousVP()
    u = times_of(1000)[0].requires_grad_()
    t = process.time(sampler.inverse_cdf(u, process))
    (slope,) = torch.autograd.grad(t.sum(), u)
    found, weight = sampler(u, process)
    assert torch.equal(found, t) and torch.equal(weight, slope.abs())
    # As near to the whole as can be is as near to its times.
    near, near_weight = within(name, 0.0, 1 - 1e-12)(u, process)
    assert torch.allclose(near, t, atol=1e-6) and torch.allclose(near_weight, weight, rtol=1e-3)


def test_the_refiner_is_asked_at_its_timesteps_and_the_base_at_the_others() -> None:
    process = DiscreteVP()
    for low, high, first, last in ((0.0, 0.2, 0, 199), (0.2, 1.0, 200, 999)):
        t, weight = Uniform(low=low, high=high)(times_of(10_000)[0], process)
        timestep = process.timestep(t)
        assert float(timestep.min()) == pytest.approx(first, abs=1e-9)
        assert float(timestep.max()) == pytest.approx(last, abs=1e-9)
        assert torch.allclose(weight, torch.ones_like(weight), rtol=1e-9)


def test_the_memory_of_losses_is_that_of_its_times() -> None:
    times, u = LossSecondMoment(4, history=1, low=0.2, high=0.6), times_of(64)[0]
    assert torch.allclose(times(u, ContinuousVP())[0], 0.2 + 0.4 * u)
    times.update([0.2, 0.35, 0.49, 0.6], [1.0, 2.0, 3.0, 2.0])
    assert [list(cell) for cell in times.losses] == [[1.0], [2.0], [3.0], [2.0]]
    t, _ = times(u, ContinuousVP())
    share = torch.histc(t, 4, 0.2, 0.6) / 64
    assert torch.allclose(share, torch.tensor([1, 2, 3, 2]).double() / 8, atol=1.5 / 64)


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1)])
def test_ends_that_enclose_nothing(ends: tuple[float, float]) -> None:
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match=r"low must be less than high, both in \[0, 1\], not"):
            replace(sampler, low=ends[0], high=ends[1])


def test_a_density_that_is_elsewhere_is_told() -> None:
    for sampler in (LogNormal(-1.2, 0.1, low=0.9), InverseVariance(t_min=0.5, high=0.4)):
        with pytest.raises(ValueError, match="draws next to no time between low .* and high"):
            sampler(times_of(8)[0], VarianceExploding())


@pytest.mark.parametrize(
    "make",
    [
        lambda: InverseVariance(t_min=0),
        lambda: LossSecondMoment(cells=0),
        lambda: LogitNormal(std=0),
        lambda: LogNormal(std=-1),
        lambda: Mode(2),
    ],
)
def test_numbers_that_make_no_sampler(make) -> None:
    with pytest.raises(ValueError, match="must"):
        make()
