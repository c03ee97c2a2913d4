"""The exact denoisers that the laws rest on, against autograd and quadrature."""

import pytest
import torch

from exact import EXACT, MIXTURE, PURE, Mixture
from ldm.diffusion import Condition, Level, RectifiedFlow, VarianceExploding

LEVELS = [(1.0, 0.3), (0.6, 0.8), (0.0, 1.0), (1.0, 50.0), (1e-4, 1.0)]


def level(alpha: float, sigma: float) -> Level:
    return Level(*torch.tensor([alpha, sigma], dtype=torch.float64))


@pytest.mark.parametrize("alpha, sigma", LEVELS)
@pytest.mark.parametrize("name", EXACT)
def test_score_is_the_gradient_and_tweedie_holds(name: str, alpha: float, sigma: float) -> None:
    data, at = EXACT[name], level(alpha, sigma)
    x = (alpha * data.sample(50, 1) + sigma * data.sample(50, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(x, at).sum(), x)
    x = x.detach()
    assert torch.allclose(data.score(x, at), gradient, atol=1e-10)
    # x_t = alpha E[x0 | x_t] + sigma E[eps | x_t]
    assert torch.allclose(alpha * data.x0_hat(x, at) + sigma * data.eps_hat(x, at), x, atol=1e-9)
    if alpha == 0:
        assert torch.allclose(data.x0_hat(x, at), data.mean.expand_as(x))
    same = data.noised(alpha, sigma)
    assert torch.allclose(same.log_prob(x, PURE), data.log_prob(x, at), atol=1e-10)


def test_posterior_mean_by_quadrature() -> None:
    x0 = torch.linspace(-6, 6, 200_001, dtype=torch.float64)[:, None]
    at = level(0.8, 0.7)
    for x_t in (-2.0, 0.1, 1.7):
        log = MIXTURE.log_prob(x0, PURE) - ((x_t - 0.8 * x0[:, 0]) / 0.7) ** 2 / 2
        mean = (log.softmax(0) * x0[:, 0]).sum()
        found = MIXTURE.x0_hat(torch.tensor([[x_t]], dtype=torch.float64), at)
        assert float(found) == pytest.approx(float(mean), abs=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_moments_of_samples(name: str) -> None:
    data, count = EXACT[name], 200_000
    x = data.sample(count, 3)
    error = 5 * float(data.cov.diagonal().max()) / count**0.5
    assert torch.allclose(x.mean(0), data.mean, atol=5 * error)
    assert torch.allclose(x.T.cov().reshape(data.cov.shape), data.cov, atol=5 * error)
    share = data.responsibilities(x, PURE).mean(0)
    assert torch.allclose(share, data.weights, atol=5 / count**0.5)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "score", "velocity"])
def test_predictor_speaks_every_target(target: str) -> None:
    data: Mixture = EXACT["correlated"]
    x = data.sample(8, 0)
    for process in (RectifiedFlow(), VarianceExploding()):
        at = process.level(torch.linspace(0.1, 0.9, 8))
        found = data.predictor(target)(x, at, torch.zeros(8), Condition(torch.zeros(8, 1, 1)))  # type: ignore[arg-type]
        assert torch.allclose(found.x0, data.x0_hat(x, at), atol=1e-8)
        assert torch.allclose(found.as_("score"), data.score(x, at), atol=1e-8)
