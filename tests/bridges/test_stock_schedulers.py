"""What a saved folder says, driven by stock: the network of each process and target, run by the
scheduler that its config names, as a stock pipeline would, reaches the data it was made for.

The network is an exact denoiser that sees what a U-Net sees: an input and a timestep, no level.
"""

import diffusers
import pytest
import torch
from torch import Tensor

from exact import GAUSSIAN
from ldm.diffusion import (
    Condition,
    ContinuousVP,
    Cosine,
    DiscreteVP,
    Edm,
    Level,
    NoiseProcess,
    Prediction,
    RectifiedFlow,
    Target,
    VarianceExploding,
    VariancePreserving,
    predictor,
    scheduler_config,
)
from ldm.diffusion.target import network_input

MEAN, STD, COUNT = 0.7, 1.2, 4000
COND = Condition(torch.zeros(COUNT, 1, 1))
CASES: dict[str, tuple[NoiseProcess, Target]] = {
    "discrete": (DiscreteVP(), "eps"),
    "vp": (ContinuousVP(), "v"),
    "cosine": (Cosine(), "v"),
    "ve edm": (VarianceExploding(0.002, 80), Edm(0.5)),
    "flow": (RectifiedFlow(), "velocity"),
    "flow shifted": (RectifiedFlow(3.0), "velocity"),
}


def level_of(process: NoiseProcess, timestep: Tensor) -> Level:
    """The level that ``process.timestep`` says ``timestep`` for."""
    ends = process.timestep(torch.tensor([0.0, 1.0]))
    t = (timestep.double() - ends[0]) / (ends[1] - ends[0])  # all are affine in t
    return process.level(t.reshape(1))


def network(process: NoiseProcess, target: Target):
    def net(x_in: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        level = level_of(process, timestep)
        x = x_in.double()
        if isinstance(target, Edm):  # takes c_in off again
            x = x * target.std(level)
        return GAUSSIAN.predictor(target)(x, level, timestep, cond).y.float()

    return net


@pytest.mark.parametrize("name", CASES)
def test_a_stock_scheduler_draws_the_data(name: str) -> None:
    process, target = CASES[name]
    config = scheduler_config(process, target)
    extra = {"timestep_spacing": "trailing"} if isinstance(process, VariancePreserving) else {}
    kind = getattr(diffusers, config.pop("_class_name"))
    scheduler = kind.from_config({**config, "clip_sample": False, **extra})
    scheduler.set_timesteps(200)
    net = network(process, target)
    z = torch.randn(COUNT, 1, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean()) / z.std()
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        y = net(scheduler.scale_model_input(x, t), t, COND)
        x = scheduler.step(y, t, x, return_dict=False)[0]
    # A linear map takes N(0, 1) there; it starts from 0 instead of alpha(1) times the mean.
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03 if name == "vp" else 0.08)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", CASES)
def test_our_predictor_shows_the_network_the_same(name: str) -> None:
    process, target = CASES[name]
    t = torch.tensor([0.37], dtype=torch.float64)
    x_t = process.perturb(torch.full((COUNT, 1), 0.3).double(), torch.ones(COUNT, 1).double(), t)
    seen: list[Tensor] = []

    def net(x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        seen.append(x)
        return network(process, target)(x, timestep, cond).double()

    level = process.level(t)
    found = predictor(net, target)(x_t, level, process.timestep(t), COND)
    assert isinstance(found, Prediction)
    assert torch.allclose(found.x0, GAUSSIAN.x0_hat(x_t, level), atol=1e-4)
    # The input does not change where x and its level come scaled, as from a scheduler of EDM.
    half = level.map(lambda part: part / 2)
    if isinstance(target, Edm):
        assert torch.allclose(network_input(target, x_t / 2, half), seen[0])
        scaled = predictor(net, target)(x_t / 2, half, process.timestep(t), COND)
        assert torch.allclose(scaled.x0, found.x0, atol=1e-6)
        assert float(seen[0].square().mean()) < 3  # of unit variance for data of std sigma_data
    else:
        assert seen[0] is x_t


def test_edm_is_table_1() -> None:
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    process, s = VarianceExploding(0.002, 80), 0.5
    x0, eps = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    t = process.time_at(-2 * sigma.log())
    x = process.perturb(x0, eps, t)
    wide = sigma[:, None]
    c_skip = s**2 / (wide**2 + s**2)
    c_out = wide * s / (wide**2 + s**2).sqrt()
    level = process.level(t)
    assert torch.allclose(level.sigma, sigma) and torch.allclose(
        process.timestep(t), sigma.log() / 4
    )
    y = (x0 - c_skip * x) / c_out
    assert torch.allclose(Prediction(x, level, x0, "x0").as_(Edm(s)), y, rtol=1e-6)
    assert torch.allclose(Prediction(x, level, y, Edm(s)).x0, x0, rtol=1e-6)
    assert torch.allclose(network_input(Edm(s), x, level), x / (wide**2 + s**2).sqrt())
