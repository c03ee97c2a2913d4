"""The variational bound of a Gaussian with its exact denoiser, against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import GAUSSIAN
from ldm.diffusion import ContinuousVP, DiscreteVP, NoiseProcess
from ldm.diffusion.variance import Posterior, Variance, bound, prior

STD = 1.2  # of exact.GAUSSIAN, whose mean is 0.7
ENTROPY = math.log(2 * math.pi * math.e) / 2 + math.log(STD)


def quadrature(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, eps, weight) that integrate polynomials over the data and the noise exactly."""
    z, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(points))
    w = w / w.sum()
    z0, eps = torch.cartesian_prod(z, z).T
    return (0.7 + STD * z0)[:, None], eps[:, None], torch.cartesian_prod(w, w).prod(1)


def terms(process: NoiseProcess, variance: Variance) -> Tensor:
    """Terms of L_vlb over all nodes, nats; a v by node may be given."""
    x0, eps, weight = quadrature(4)
    found = []
    for node in range(process.num_train_timesteps):
        t = torch.full((len(x0),), (node + 1) / process.num_train_timesteps, dtype=torch.float64)
        x_t = process.perturb(x0, eps, t)
        x0_hat = GAUSSIAN.x0_hat(x_t, process.level(t))
        v = variance if isinstance(variance, str) else variance[node].expand(len(x0), 1)
        found.append((weight * bound(process, t, x_t, x0, x0_hat, v)).sum())
    return torch.stack(found)


def closed_form(process: NoiseProcess, node: int, variance: Tensor) -> float:
    """Of the KL at ``node`` > 0: E (x0 - x0_hat)^2 is the posterior variance of x0."""
    (a, s), (a0, s0) = ([float(p[n]) for p in process.table[:2]] for n in (node, node - 1))
    ratio = a / a0
    beta = s**2 - ratio**2 * s0**2
    tilde, error = beta * s0**2 / s**2, STD**2 * s**2 / (a**2 * STD**2 + s**2)
    v = float(variance[node])
    return ((tilde + (a0 * beta / s**2) ** 2 * error) / v - 1 + math.log(v / tilde)) / 2


@pytest.mark.parametrize(
    "process", [DiscreteVP("linear", 0.001, 0.2, 100), ContinuousVP(0.1, 20, 60)]
)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde", -0.4])
def test_terms_are_those_of_the_closed_form(process: NoiseProcess, variance) -> None:
    alpha, sigma = process.table[:2]
    alpha0 = torch.cat([torch.ones(1).double(), alpha[:-1]])
    sigma0 = torch.cat([torch.zeros(1).double(), sigma[:-1]])
    beta = sigma**2 - (alpha / alpha0 * sigma0) ** 2
    tilde = beta * sigma0**2 / sigma**2
    tilde[0] = tilde[1]  # Nichol & Dhariwal: no variance of 0
    share = {"beta": 1.0, "beta_tilde": 0.0}.get(variance) if isinstance(variance, str) else 0.3
    expected = (share * beta.log() + (1 - share) * tilde.log()).exp()  # v = -0.4 is a share of 0.3
    count = process.num_train_timesteps
    v = variance if isinstance(variance, str) else torch.full((count,), variance).double()
    found = terms(process, v)
    for node in range(1, process.num_train_timesteps):
        assert float(found[node]) == pytest.approx(closed_form(process, node, expected), rel=1e-8)
    error = STD**2 * float(sigma[0]) ** 2 / (float(alpha[0]) ** 2 * STD**2 + float(sigma[0]) ** 2)
    first = (error / float(expected[0]) + math.log(2 * math.pi * float(expected[0]))) / 2
    assert float(found[0]) == pytest.approx(first, rel=1e-8)


def best(process: NoiseProcess) -> Tensor:
    """v by node with which p(x_s | x_t) is the true q(x_s | x_t), which is Gaussian too."""
    alpha, sigma = process.table[:2]
    alpha0 = torch.cat([torch.ones(1).double(), alpha[:-1]])
    sigma0 = torch.cat([torch.zeros(1).double(), sigma[:-1]])
    beta = sigma**2 - (alpha / alpha0 * sigma0) ** 2
    tilde = beta * sigma0**2 / sigma**2
    error = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    true = tilde + (alpha0 * beta / sigma**2) ** 2 * error
    tilde[0] = tilde[1]
    return 2 * (true / tilde).log() / (beta / tilde).log() - 1


@pytest.mark.parametrize("count", [3, 20, 150])
def test_the_bound_of_exact_steps_is_the_likelihood(count: int) -> None:
    # At any number of steps: the entropy, and what N(0, 1) at the end costs.
    for process in (ContinuousVP(0.1, 8, count), DiscreteVP("linear", 0.01, 0.2, count)):
        x0, _, weight = quadrature(4)
        cost = float((weight * prior(process, x0)).sum())
        end = process.level(torch.ones(()))
        a, s = float(end.alpha), float(end.sigma)
        marginal = a**2 * STD**2 + s**2
        kl = (marginal + (0.7 * a) ** 2 - 1 - math.log(marginal)) / 2
        v = best(process)
        total = float(terms(process, v).sum()) + cost
        assert total == pytest.approx(ENTROPY + kl, abs=1e-9)
        # Any other variance costs.
        assert float(terms(process, v + 0.1).sum()) + cost > total
        assert float(terms(process, v - 0.1).sum()) + cost > total


def test_prior_is_the_kl_to_where_sampling_starts() -> None:
    x0 = torch.tensor([[0.3], [-2.0]]).double()
    for process in (ContinuousVP(0.1, 5), DiscreteVP()):
        a, s = (float(p) for p in process.level(torch.ones(()))[:2])
        expected = [(s**2 + (a * float(x)) ** 2 - 1 - 2 * math.log(s)) / 2 for x in x0]
        assert prior(process, x0).tolist() == pytest.approx(expected, abs=1e-12)


def test_bins_are_a_distribution_of_pixels() -> None:
    process = DiscreteVP()
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    t = torch.full((256,), 0.001, dtype=torch.float64)
    for mean, v in ((0.1, 1.0), (-0.97, 1.0), (0.999, -1.0), (0.5, 0.0)):
        x0_hat, share = torch.full_like(pixels, mean), torch.full((256, 1), v)
        nats = bound(process, t, pixels, pixels, x0_hat, share, 256)
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-6)
        if abs(mean) < 0.9:  # the outermost bins have all that is beyond
            assert abs(int(nats.argmin()) - (mean + 1) * 127.5) <= 0.51


def test_bins_are_a_density_where_they_are_narrow() -> None:
    # So that nats per bin are nats of the density and the log of the bins per unit.
    process = DiscreteVP("linear", 0.01, 0.2, 40)
    x0, _, _ = quadrature(4)
    node, inside = torch.full((len(x0),), 1 / 40, dtype=torch.float64), x0.abs()[:, 0] < 0.9
    args = (process, node, x0, x0, 0.95 * x0, "beta")
    difference = (bound(*args, 256) - bound(*args))[inside]
    assert torch.allclose(difference, torch.full_like(difference, math.log(127.5)), atol=1e-3)


def test_posterior_of_bayes() -> None:
    # q(x_s | x_t, x0) from q(x_s | x0) q(x_t | x_s), for levels of any kind.
    process = DiscreteVP()
    for t, s in ((0.9, 0.5), (0.3, 0.299), (0.002, 0.001)):
        level, before = (process.level(torch.tensor(x, dtype=torch.float64)) for x in (t, s))
        step = Posterior.between(level, before)
        ratio, beta = float(level.alpha / before.alpha), float(step.beta)
        precision = 1 / float(before.sigma) ** 2 + ratio**2 / beta
        assert float(step.beta_tilde) == pytest.approx(1 / precision, rel=1e-9)
        assert float(step.on_x_t) == pytest.approx(ratio / beta / precision, rel=1e-9)
        share = float(before.alpha) / float(before.sigma) ** 2 / precision
        assert float(step.on_x0) == pytest.approx(share, rel=1e-9)
    end = Posterior.between(
        DiscreteVP(zero_terminal_snr=True).level(torch.ones(()).double()),
        process.level(torch.tensor(0.99)),
    )
    assert all(bool(part.isfinite()) for part in end) and float(end.on_x_t) == 0
