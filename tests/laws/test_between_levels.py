"""Samplers that begin or end between noise and data, and what they promise besides numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from exact import CORRELATED, GAUSSIAN, MIXTURE
from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Prediction,
    RectifiedFlow,
    VarianceExploding,
    scheduler_config,
)
from ldm.sampling import Adaptive, Ddim, Heun, Langevin, ReverseSde, slerp
from ldm.sampling.samplers import PROCESS_SAMPLERS
from pushed import at, made, noise, run
from turns import turns

MEAN, STD = 0.7, 1.2


def psnr(x: Tensor, y: Tensor) -> float:
    """dB, of the range of ``y``."""
    return float(10 * ((y.max() - y.min()) ** 2 / (x - y).square().mean()).log10())


# Measured: Euler 33 to 48 dB at 100 steps, Heun 82 to 130 dB.
@pytest.mark.parametrize("case, name, steps, least", [
    ("discrete", "ode-euler", 100, 38),
    ("edm", "ode-euler", 100, 32),
    ("flow", "ode-euler", 100, 37),
    ("discrete", "ode-heun", 40, 60),
    ("edm", "ode-heun", 40, 50),
    ("flow", "ode-heun", 40, 60),
    ("zero", "ode-adaptive", 10, 100),
    ("shifted", "ode-adaptive", 10, 100),
])  # fmt: skip
def test_data_come_back_from_the_noise_they_become(case, name, steps, least) -> None:
    which, x0 = made(case, name), MIXTURE.sample(100, 0)
    x = x0 * at(which.process, 0.0).alpha  # as good as data: sigma is 0.03 at most
    z = run(which, MIXTURE, x, steps, start=0.0, stop=1.0)
    assert abs(float(z.std()) / which.process.prior_std() - 1) < 0.25
    assert psnr(run(which, MIXTURE, z, steps, start=1.0, stop=0.0), x) > least


@pytest.mark.parametrize("name", ["ode-heun", "ancestral"])
def test_a_run_in_two_parts_is_the_run(name: str) -> None:
    which = made("flow", name)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    draw = torch.Generator().manual_seed(1)
    whole = run(which, CORRELATED, x, 11, generators=draw)  # 10 steps between nodes, and the last
    draw = torch.Generator().manual_seed(1)
    half = run(which, CORRELATED, x, 5, start=1.0, stop=0.5, generators=draw)
    assert torch.allclose(run(which, CORRELATED, half, 6, start=0.5, generators=draw), whole)


@pytest.mark.parametrize(
    ("case", "name", "steps", "share"),
    turns(
        ["discrete", "edm", "flow", "shifted", "zero"],
        [
            (name, steps, share)
            for name in ("ode-euler", "ode-heun", "ancestral", "pc")
            for steps, share in ((10, 0.8), (11, 0.8), (7, 0.35))
        ],
    ),
)
def test_shares_of_the_way_are_those_of_its_steps(case, name, steps, share) -> None:
    which = made(case, name)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    seen: list[int] = []

    def taken(**part) -> Tensor:
        return run(which, CORRELATED, part.pop("x", x), steps, generators=draw, **part,
                   callback=lambda index, t, x: seen.append(index))  # fmt: skip

    draw = torch.Generator().manual_seed(1)
    whole = taken()
    draw = torch.Generator().manual_seed(1)
    seen.clear()
    half = taken(denoising_end=share)
    first = which.evaluations(steps, denoising_end=share)
    assert torch.equal(taken(x=half, denoising_start=share), whole)
    last = which.evaluations(steps, denoising_start=share)
    assert first + last == steps and seen == [*range(first), *range(last)]
    assert first == {(10, 0.8): 8, (11, 0.8): 9, (7, 0.35): 3}[steps, share]
    assert not torch.allclose(half, whole)


def test_noise_is_scaled_and_x_t_is_not() -> None:
    which = Ddim(VarianceExploding(0.01, 50), "score")
    z = torch.ones(1, 1).double()
    scaled = run(which, GAUSSIAN, z, 10)
    given = run(which, GAUSSIAN, z * math.hypot(1, 50), 10, start=1.0)
    assert torch.allclose(scaled, given, atol=1e-9)


def test_ddim_and_ancestral_steps_are_those_of_diffusers() -> None:
    # From node to node, as the schedulers go: eq. 16 with eta, and both variances of DDPM.
    process = DiscreteVP()
    config = {**scheduler_config(process, "eps"), "clip_sample": False}
    x = CORRELATED.sample(7, 3).float()
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))

    def ours(which: Ddim, node: int) -> Tensor:
        u = torch.tensor([node + 0.5, node - 0.5]) / 1000
        with noise(lambda shape: z):
            start, stop = u.tolist()
            return run(which, CORRELATED, x, 1, start=start, stop=stop)

    for node in (999, 500, 20):
        level = process.at(torch.tensor(node))
        eps = CORRELATED.eps_hat(x, level).float()
        for eta in (0.0, 0.4, 1.0):
            ddim = DDIMScheduler.from_config(config)
            ddim.set_timesteps(1000)
            theirs = ddim.step(eps, node, x, eta=eta, variance_noise=z).prev_sample
            assert torch.allclose(ours(Ddim(process, "eps", eta), node), theirs, atol=2e-5)
        for variance, name in (("beta_tilde", "fixed_small"), ("beta", "fixed_large")):
            ddpm = DDPMScheduler.from_config(config, variance_type=name)
            ddpm.set_timesteps(1000)
            mean = ddpm._get_variance(node) ** 0.5  # noqa: SLF001
            theirs = Ddim(process, "eps", 1.0, variance)
            with noise(lambda shape: torch.zeros(shape)):
                still = run(
                    theirs, CORRELATED, x, 1, start=(node + 0.5) / 1000, stop=(node - 0.5) / 1000
                )
            assert torch.allclose(ours(theirs, node) - still, mean * z, atol=1e-5)


def test_a_learned_variance_is_between_the_two() -> None:
    process = DiscreteVP()
    x, spread = torch.zeros(1, 1), {}

    def predict(v: float | None):
        def network(x_t: Tensor, level, timestep, cond) -> Prediction:
            learned = None if v is None else torch.full_like(x_t, v)
            return Prediction(x_t, level, torch.zeros_like(x_t), "eps", learned)

        return network

    cond, call = Condition(torch.zeros(1, 1, 1)), {"steps": 1, "start": 0.0025, "stop": 0.0015}
    for key, which, v in (
        ("small", Ddim(process, "eps", 1.0), None),
        ("large", Ddim(process, "eps", 1.0, "beta"), None),
        ("v = -1", Ddim(process, "eps", 1.0), -1.0),
        ("v = 0", Ddim(process, "eps", 1.0), 0.0),
        ("v = 1", Ddim(process, "eps", 1.0), 1.0),
    ):
        with noise(lambda shape: torch.ones(shape)):
            spread[key] = float(which(predict(v), x, cond, **call))
    assert spread["small"] == pytest.approx(spread["v = -1"], rel=1e-6)
    assert spread["large"] == pytest.approx(spread["v = 1"], rel=1e-6)
    assert spread["v = 0"] == pytest.approx(math.sqrt(spread["small"] * spread["large"]), rel=1e-6)
    assert spread["large"] > 1.2 * spread["small"]


def test_a_generator_for_each_sample() -> None:
    which = made("ve", "pc")
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    draws = [torch.Generator().manual_seed(i) for i in range(3)]
    whole = run(which, CORRELATED, x, 8, generators=draws)
    for i in range(3):
        draw = [torch.Generator().manual_seed(i)]
        alone = run(which, CORRELATED, x[i : i + 1], 8, generators=draw)
        assert torch.allclose(alone[0], whole[i], atol=1e-4) and alone.dtype == torch.float32


def test_callback_sees_and_replaces() -> None:
    which, seen = Heun(RectifiedFlow(), "velocity"), []

    def callback(index: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        seen.append((index, round(float(timestep))))
        return torch.full_like(latent, 7.0) if index == which.evaluations(5) - 1 else None

    found = run(which, GAUSSIAN, torch.zeros(2, 1), 5, callback=callback)
    assert seen == [(0, 1000), (1, 750), (2, 500), (3, 251), (4, 1)]
    assert bool((found == 7).all())


def test_callback_of_the_adaptive_sampler() -> None:
    which, seen = replace(made("ve", "ode-adaptive"), tolerance=1e-11), []
    begin = torch.tensor([[20.0], [-11.0]]).double()

    def record(index: int, timestep: Tensor, latent: Tensor) -> None:
        seen.append((index, float(timestep), latent))

    found = run(which, GAUSSIAN, begin, 10, start=1.0, stop=0.0, callback=record)
    assert torch.equal(seen[-1][2], found)
    assert [index for index, *_ in seen] == list(range(len(seen))) and len(seen) > 4
    # x as at any level, not of unit size: on a Gaussian it is known, at the time of the next step.
    top = at(which.process, 1.0).sigma
    for (_, _, x), (_, timestep, _) in itertools.pairwise(seen):
        sigma = math.exp(4 * timestep)
        there = MEAN + (begin - MEAN) * math.hypot(STD, sigma) / math.hypot(STD, float(top))
        assert torch.allclose(x, there, rtol=1e-4, atol=1e-4)
    assert seen[0][1] == pytest.approx(float(which.process.timestep(torch.ones(()))))

    # What it puts in place of x at a time is what is brought to the end from there.
    def replaced(index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        return latent + 1 if index == 2 else latent

    moved = run(which, GAUSSIAN, begin, 10, start=1.0, stop=0.0, callback=replaced)
    low, sigma = float(at(which.process, 0.0).sigma), math.exp(4 * seen[3][1])
    assert torch.allclose(
        moved - found, torch.full((2, 1), math.hypot(STD, low) / math.hypot(STD, sigma)).double(),
        rtol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ode-euler", "ode-heun", "ancestral", "sde", "pc"])
def test_more_steps_than_a_table_has_nodes(name: str) -> None:
    process, target = DiscreteVP(num_train_timesteps=10), "eps"
    which = PROCESS_SAMPLERS[name](process, target, 0.0)
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    few, many = (
        run(which, GAUSSIAN, x, steps, generators=torch.Generator().manual_seed(1))
        for steps in (10, 37)
    )
    assert bool(many.isfinite().all())
    if name == "pc":  # which corrects once a step
        assert abs(float(many.std()) / float(few.std()) - 1) < 0.1
    elif name != "sde":
        assert torch.allclose(few, many)


def test_a_continuous_process_is_walked_evenly_from_end_to_end() -> None:
    for process in (VarianceExploding(num_train_timesteps=10), RectifiedFlow(3.0, 10)):
        times = process.grid(7)
        assert float(times[0]) == 1 and float(times[-1]) == pytest.approx(0.1)
        shift = getattr(process, "shift", 1.0)
        u = times / (shift - (shift - 1) * times)
        assert torch.allclose(u.diff(), u.diff().mean().expand(6))
    nodes = torch.arange(10, 0, -1).double() / 10
    assert torch.allclose(DiscreteVP(num_train_timesteps=10).grid(10), nodes)


def test_a_condition_of_nothing_has_no_length() -> None:
    with pytest.raises(ValueError, match="a Condition of nothing has no length"):
        len(Condition())


def test_one_step_is_the_denoiser_at_pure_noise() -> None:
    found = run(made("flow", "ode-adaptive"), MIXTURE, torch.randn(4, 1).double(), 1)
    assert torch.allclose(found, MIXTURE.mean.expand(4, 1))


def test_slerp() -> None:
    a, b = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    lengths = torch.stack([slerp(a, b, w).flatten(1).norm(dim=1) for w in (0.25, 0.5, 0.75)])
    assert bool((lengths / 16 - 1).abs().max() < 0.15)
    assert float(((a + b) / 2).flatten(1).norm(dim=1).mean()) < 12.5  # what a straight line does
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-3)


def test_refusals_are_one_line() -> None:
    x = torch.zeros(1, 1)
    euler, sde = Ddim(DiscreteVP(), "eps"), ReverseSde(DiscreteVP(), "eps")
    for words, call in {
        "steps must be at least 1, not 0": lambda: run(euler, GAUSSIAN, x, 0),
        "start and stop must lie in .0, 1., not 1.2": lambda: run(euler, GAUSSIAN, x, 5, start=1.2),
        "runs from noise to data: start .0.2. must not be below stop": lambda: run(
            sde, GAUSSIAN, x, 5, start=0.2, stop=0.4
        ),
        "Ddim runs from noise to data": lambda: run(
            Ddim(DiscreteVP(), "eps", 0.5), GAUSSIAN, x, 5, start=0.2, stop=0.4
        ),
        "eta must lie in .0, 1., not 2": lambda: Ddim(DiscreteVP(), "eps", 2),
        "target 'eps' says nothing about x0": lambda: Adaptive(RectifiedFlow(), "eps"),
        "use sampler 'pc', or process 've'": lambda: Langevin(DiscreteVP(), "eps"),
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)

    def network(x_t: Tensor, level, timestep, cond) -> Prediction:
        return Prediction(x_t, level, x_t, "eps")

    with pytest.raises(ValueError, match="target 'eps' says nothing"):
        Heun(RectifiedFlow(), "velocity")(network, x, Condition(torch.zeros(1, 1, 1)), steps=3)
