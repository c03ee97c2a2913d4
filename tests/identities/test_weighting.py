"""Weights against their papers, and the loss with a learned variance or importance weights."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import GAUSSIAN
from ldm.diffusion import (
    Condition,
    ContinuousVP,
    DiscreteVP,
    Edm,
    NoiseProcess,
    Objective,
    Target,
    TargetName,
    VarianceExploding,
    Weighting,
    WeightingName,
    determinant,
)
from ldm.diffusion.times import InverseVariance, LogitNormal, TimeSampler, Uniform
from ldm.diffusion.variance import bound

T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
TARGETS: list[Target] = [*get_args(TargetName), Edm(0.5)]
COND = Condition(torch.zeros(8, 1, 1))


def on_x0(weighting: Weighting, target: Target, process: NoiseProcess, t: Tensor = T) -> Tensor:
    """The weight on |x0 - x0_hat|^2 that a loss in the space of ``target`` has."""
    level = process.level(t)
    return weighting(target, level) * (determinant(target, level) / level.sigma) ** 2


FORMS = {
    "sigma2": (Weighting("sigma2"), lambda snr: snr),
    "min_snr": (Weighting("min_snr", 3.0), lambda snr: snr.clamp(max=3)),
    "soft_min_snr": (Weighting("soft_min_snr", 4.0), lambda snr: 4 * snr / (snr + 4)),
    "truncated_snr": (Weighting("truncated_snr"), lambda snr: snr.clamp(min=1)),
    "p2": (Weighting("p2", 0.5), lambda snr: snr / (1 + snr).sqrt()),
    "p2 with k": (Weighting("p2", k=2.0), lambda snr: snr / (2 + snr)),
}


@pytest.mark.parametrize("process", [ContinuousVP(), VarianceExploding()], ids=lambda p: p.kind)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_one_weight_for_every_target(name: str, target: Target, process: NoiseProcess) -> None:
    weighting, form = FORMS[name]
    found = on_x0(weighting, target, process)
    assert torch.allclose(found, form(process.level(T).snr), rtol=1e-9)
    assert weighting.kind in get_args(WeightingName)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("space", TARGETS, ids=str)
def test_uniform_in_any_space(target: Target, space: Target) -> None:
    process = ContinuousVP()
    found = on_x0(Weighting(space=space), target, process)
    assert torch.allclose(found, on_x0(Weighting(), space, process), rtol=1e-9)
    # sigma^2 |score error|^2 is |eps error|^2, and EDM's lambda is 1 / c_out^2.
    eps = on_x0(Weighting(space="eps"), target, process)
    assert torch.allclose(eps, on_x0(Weighting("sigma2"), target, process), rtol=1e-9)
    sigma = VarianceExploding().level(T).sigma
    edm = on_x0(Weighting(space=Edm(0.5)), target, VarianceExploding())
    assert torch.allclose(edm, (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-9)


@pytest.mark.parametrize("process", [ContinuousVP(), VarianceExploding(), DiscreteVP()])
def test_elbo_is_half_the_fall_of_snr(process: NoiseProcess) -> None:
    t = T.clone().requires_grad_()
    (rate,) = torch.autograd.grad(process.level(t).snr.sum(), t)
    for target in TARGETS:
        assert torch.allclose(on_x0(Weighting("elbo"), target, process), -rate / 2, rtol=1e-8)
    zero = DiscreteVP(zero_terminal_snr=True)
    assert bool(Weighting("elbo")("v", zero.table).isfinite().all())


def gaussian_loss(process: NoiseProcess, objective: Objective, count: int) -> float:
    """Mean of the loss with the exact denoiser of ``exact.GAUSSIAN`` over data, noise and u."""
    z, w = np.polynomial.hermite_e.hermegauss(3)
    z, w = torch.from_numpy(z), torch.from_numpy(w / w.sum())
    pairs, weight = torch.cartesian_prod(z, z), torch.cartesian_prod(w, w).prod(1)
    u = (torch.arange(count).double() + 0.5) / count
    x0 = (0.7 + 1.2 * pairs[:, 0]).repeat(count)[:, None]
    eps, times = pairs[:, 1].repeat(count)[:, None], u.repeat_interleave(9)

    def denoiser(x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        t, _ = objective.times(times, process)
        predict = GAUSSIAN.predictor(objective.target)
        return predict(x, process.level(t), timestep, cond).y

    terms = objective(process, denoiser, x0, COND, u=times, eps=eps)
    return float((terms.loss.reshape(count, 9) @ weight).mean())


@pytest.mark.parametrize("target", ["eps", "v", "x0", "velocity"])
@pytest.mark.parametrize(
    "times", [Uniform(), InverseVariance(1e-5), LogitNormal(-0.5, 1.3, unbiased=True)], ids=str
)
def test_weighted_loss_of_a_gaussian_is_its_integral(target: Target, times: TimeSampler) -> None:
    # E |x0 - x0_hat|^2 = s^2 / (1 + s^2 snr), so that -snr' / 2 times it integrates to a logarithm,
    # whatever the target, and whatever the times where they are unbiased.
    process = VarianceExploding(0.05, 20)
    objective = Objective(target, "elbo", times=times)
    found = gaussian_loss(process, objective, 20_000)
    snr = process.level(torch.tensor([0.0, 1.0])).snr
    exact = float((1 + 1.44 * snr[0]).log() - (1 + 1.44 * snr[1]).log()) / 2
    # The outermost times of 20,000 normal ones leave 0.3 % of [0, 1] to either side.
    assert found == pytest.approx(exact, rel=1e-2 if isinstance(times, LogitNormal) else 1e-4)
    if times.unbiased:
        biased = gaussian_loss(
            process, replace(objective, times=replace(times, unbiased=False)), 5000
        )
        assert abs(biased - exact) > 0.1 * exact


def test_hybrid_loss_and_its_stop_gradient() -> None:
    process, objective = DiscreteVP(), Objective("eps", learned_variance=True)
    draw = torch.Generator().manual_seed(0)
    z, eps, mean, v = torch.randn(4, 8, 3, 4, 4, generator=draw, dtype=torch.float64)
    u = torch.linspace(0, 0.99, 8)
    out = torch.cat([mean, v.tanh()], 1).requires_grad_()
    terms = objective(process, lambda x, t, c: out, z, COND, u=u, eps=eps)
    t = process.time(u)
    x_t = process.perturb(z, eps, t)
    level = process.level(t).like(z)
    x0_hat = (x_t - level.sigma * mean) / level.alpha
    nats = bound(process, t, x_t, z, x0_hat, v.tanh())
    simple = (mean - eps).square().mean((1, 2, 3))
    assert torch.allclose(terms.mse, simple) and torch.allclose(terms.bound, nats)
    assert torch.allclose(terms.loss, simple + 0.001 * 1000 * nats)  # lambda L_vlb, a sum over N
    (gradient,) = torch.autograd.grad(terms.loss.sum(), out)
    # The mean learns from L_simple alone, the variance from the bound alone.
    assert torch.allclose(gradient[:, :3], 2 * (mean - eps) / 48)
    share = v.tanh().clone().requires_grad_()
    (alone,) = torch.autograd.grad(bound(process, t, x_t, z, x0_hat, share).sum(), share)
    assert torch.allclose(gradient[:, 3:], alone)
    assert float(alone.abs().min(0).values.max()) > 0
