"""Every sampler of times: its density, its importance weight, its state."""

import math

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
    grid = low + (1 - low) * (torch.arange(1_000_000).double() + 0.5) / 1_000_000
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
