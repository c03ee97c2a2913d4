"""log p(x) along the ODE against densities in closed form."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import CORRELATED, GAUSSIAN, MIXTURE, PURE, Mixture
from ldm.diffusion import Condition, ContinuousVP, NoiseProcess, normal
from ldm.diffusion.likelihood import bits_per_dim, log_likelihood
from pushed import CASES, at

MEAN, STD = 0.7, 1.2


def log_p(case: str, data: Mixture, x: Tensor, **settings) -> Tensor:
    process, target = CASES[case]
    cond = Condition(torch.zeros(len(x), 1, 1))
    return log_likelihood(process, data.predictor(target), x, cond, **settings)


def smoothed(process: NoiseProcess, data: Mixture) -> Mixture:
    """The data with the first node's noise, on the scale of the data."""
    level = at(process, 0.0)
    return data.noised(1.0, float(level.sigma / level.alpha))


@pytest.mark.parametrize("case", CASES)
def test_gaussian(case: str) -> None:
    process = CASES[case][0]
    z, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(8))
    x = (MEAN + STD * z)[:, None]
    found = log_p(case, GAUSSIAN, x, steps=50)
    # An affine flow: x0 comes to where N(0, 1) is asked, in the coordinates of unit size.
    end = at(process, 1.0)
    alpha, sigma = (float(part) / process.prior_std() for part in end[:2])
    own = smoothed(process, GAUSSIAN)
    grow = math.hypot(alpha * STD, sigma) / float(own.cov[0, 0]) ** 0.5
    there = alpha * MEAN + grow * (x - MEAN)
    expected = -there.square() / 2 - math.log(2 * math.pi) / 2 + math.log(grow)
    assert torch.allclose(found, expected[:, 0], atol=1e-4)
    # And so to 1e-3 nats the entropy, and what it costs to ask for pure noise at the end.
    entropy = math.log(2 * math.pi * math.e) / 2 + math.log(STD)
    variance = (alpha * STD) ** 2 + sigma**2
    kl = (variance + (alpha * MEAN) ** 2 - 1 - math.log(variance)) / 2
    assert kl == pytest.approx(0, abs=2e-3)
    assert float(weight @ found / weight.sum()) == pytest.approx(-entropy - kl, abs=1e-3)


@pytest.mark.parametrize("case", ["vp", "cosine", "flow", "ve"])
def test_data_narrower_than_the_noise_of_the_first_node(case: str) -> None:
    """Steps even in t are too long there: 0.2 nats a dimension too many."""
    process, std = CASES[case][0], 0.002
    data = Mixture(*(torch.tensor(p).double() for p in ([1.0], [[0.0]], [[[std**2]]])))
    own = smoothed(process, data)
    x = float(own.cov[0, 0]) ** 0.5 * torch.tensor([[-2.0], [-0.5], [0.0], [1.0]]).double()
    end = at(process, 1.0)
    # The affine flow ends at another width than 1: the density at the end is known there too.
    width = math.hypot(float(end.alpha) * std, float(end.sigma)) / process.prior_std()
    z = x / float(own.cov[0, 0]) ** 0.5
    beyond = math.log(width) + z[:, 0].square() * (1 - width**2) / 2
    found = log_p(case, data, x, steps=50)
    assert torch.allclose(found, own.log_prob(x, PURE) + beyond, atol=1e-4)


@pytest.mark.parametrize("case", ["vp", "cosine", "flow", "ve"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(MIXTURE, id="mixture", marks=pytest.mark.slow),
        pytest.param(CORRELATED, id="correlated"),
    ],
)
def test_mixtures(case: str, data: Mixture) -> None:
    x = data.sample(60, 5)
    found = log_p(case, data, x, steps=50) / x.shape[1]
    own = smoothed(CASES[case][0], data).log_prob(x, PURE) / x.shape[1]
    assert float((found - own).abs().mean()) < 6e-3  # on "ve" pure noise has another mean than x_T
    assert float((found - data.log_prob(x, PURE) / x.shape[1]).mean().abs()) < 1e-2


def test_error_falls_at_order_four() -> None:
    x = MIXTURE.sample(50, 0)
    own = smoothed(CASES["flow"][0], MIXTURE).log_prob(x, PURE)
    errors = [float((log_p("flow", MIXTURE, x, steps=n) - own).abs().mean()) for n in (10, 20, 40)]
    assert all(3.3 < math.log2(few / more) < 5 for few, more in itertools.pairwise(errors))


def test_signs_estimate_the_trace_without_bias() -> None:
    x = CORRELATED.sample(6, 1)
    exact = log_p("vp", CORRELATED, x, steps=10)
    signs = [
        torch.tensor(s).double().expand_as(x) for s in itertools.product([-1.0, 1.0], repeat=2)
    ]
    every = log_p("vp", CORRELATED, x, steps=10, probes=torch.stack(signs))
    assert torch.allclose(every, exact, atol=1e-9)
    some = normal(0, "probe", 0, (3, *x.shape)).sign()
    found = log_p("vp", CORRELATED, x, steps=10, probes=some)
    alone = [log_p("vp", CORRELATED, x, steps=10, probes=one[None]) for one in some]
    assert torch.allclose(found, torch.stack(alone).mean(0), atol=1e-9)
    assert 1e-3 < float((found - exact).abs().max()) < 3
    # For a diagonal Jacobian a single probe is exact, whatever its signs.
    data = GAUSSIAN.sample(4, 0)
    one = log_p("vp", GAUSSIAN, data, probes=some[:1, :4, :1], steps=20)
    assert torch.allclose(one, log_p("vp", GAUSSIAN, data, steps=20), atol=1e-9)


def test_any_number_of_axes_and_float32() -> None:
    def predict(x, level, timestep, cond):
        flat = GAUSSIAN.predictor("v")(x.reshape(-1, 1), level, timestep, cond)
        return type(flat)(x, level, flat.y.reshape(x.shape), "v")

    x = (MEAN + STD * normal(0, "x", 0, (2, 2, 2))).float()
    found = log_likelihood(ContinuousVP(), predict, x, Condition(torch.zeros(2, 1, 1)), steps=15)
    single = log_p("vp", GAUSSIAN, x.double().reshape(-1, 1), steps=15).reshape(2, -1).sum(1)
    assert found.shape == (2,) and found.dtype == torch.float64
    assert torch.allclose(found, single, atol=1e-4)


def test_bits_per_dim_of_dequantised_pixels() -> None:
    # Uniform over the 256 bins: density 1 / (256 * 2 / 255) a dimension, 8 bits.
    nats = torch.tensor([-10 * math.log(256 * 2 / 255)])
    assert float(bits_per_dim(nats, 10)) == pytest.approx(8, abs=1e-6)
    assert float(bits_per_dim(torch.zeros(1), 3, bins=2)) == -1
