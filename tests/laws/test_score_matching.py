"""Implicit, sliced and denoising score matching have one optimum, the score of the data they see.

The model is a sum of Gaussian bumps, linear in its weights, so each loss is a quadratic whose
minimum is one solve; expectations are quadrature, so what is left is the model's own error.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import CORRELATED, MIXTURE, PURE, Mixture
from ldm.diffusion import Level
from ldm.diffusion.score_matching import Score, denoising, implicit, sliced

AT = Level(*torch.tensor([0.8, 0.8], dtype=torch.float64))
# Bumps per axis, their width, nodes per axis.
DATA = {"mixture": (MIXTURE, 20, 0.6, 60), "correlated": (CORRELATED, 9, 1.1, 14)}


def hermite(points: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Nodes ``n d`` and weights of a standard normal."""
    z, w = np.polynomial.hermite_e.hermegauss(points)
    grid = np.array(list(itertools.product(z, repeat=dimensions)))
    weights = np.array([np.prod(row) for row in itertools.product(w, repeat=dimensions)])
    return torch.from_numpy(grid), torch.from_numpy(weights / weights.sum())


def nodes(data: Mixture, points: int) -> tuple[Tensor, Tensor]:
    """x of ``data`` and weights."""
    z, w = hermite(points, data.means.shape[1])
    roots = torch.linalg.cholesky(data.covs)
    x = data.means[:, None] + torch.einsum("kij,nj->kni", roots, z)
    return x.flatten(0, 1), (data.weights[:, None] * w).flatten()


def features(x: Tensor, per_axis: int, width: float) -> Tensor:
    """``b m d``: gradients of bumps on a grid (a score is a gradient), and of linear functions and
    squares.
    """
    axis = torch.linspace(-3.5, 3.5, per_axis, dtype=torch.float64)
    centres = torch.cartesian_prod(*[axis] * x.shape[1]).reshape(-1, x.shape[1])
    off = x[:, None] - centres
    bumps = -off * (-(off**2).sum(-1, keepdim=True) / (2 * width**2)).exp()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    return torch.cat([bumps, eye.expand(len(x), -1, -1), x[:, None] * eye], 1)


def fitted(loss, per_axis: int, width: float, d: int) -> Score:
    """The model at the minimum of ``loss(score)``, a quadratic of the weights."""
    count = per_axis**d + 2 * d

    def model(theta: Tensor) -> Score:
        return lambda x: torch.einsum("m,bmd->bd", theta, features(x, per_axis, width))

    zero = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(model(zero)), zero, create_graph=True)
    rows = torch.eye(count, dtype=torch.float64)
    (hessian,) = torch.autograd.grad(gradient, zero, rows, is_grads_batched=True)
    hessian = hessian + 1e-9 * hessian.diagonal().mean() * rows
    return model(-torch.linalg.solve(hessian, gradient.detach()))


@pytest.mark.parametrize("name", DATA)
def test_they_agree_at_the_optimum(name: str) -> None:
    data, per_axis, width, points = DATA[name]
    d = data.means.shape[1]
    noised = data.noised(AT.alpha, AT.sigma)
    x, w = nodes(noised, points)
    x0, w0 = nodes(data, points)
    z, wz = hermite(points, d)
    pairs, weights = x0.repeat_interleave(len(z), 0), torch.outer(w0, wz).flatten()
    eps = z.repeat(len(x0), 1)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    signs = signs[: len(signs) // 2]  # all Rademacher vectors: v and -v say the same
    losses = {
        "denoising": lambda s: (weights * denoising(s, pairs, eps, AT)).sum(),
        "implicit": lambda s: (w * implicit(s, x)).sum(),
        "sliced": lambda s: (
            sum((w * sliced(s, x, v.expand_as(x))).sum() for v in signs) / len(signs)
        ),
    }
    scores = {key: fitted(loss, per_axis, width, d)(x) for key, loss in losses.items()}
    true = noised.score(x, PURE)
    size = (w * true.square().sum(1)).sum()

    def apart(a: Tensor, b: Tensor) -> float:
        return float(((w * (a - b).square().sum(1)).sum() / size).sqrt())

    for key, score in scores.items():
        assert apart(score, true) < 0.02, key
    for one, two in itertools.combinations(scores.values(), 2):
        assert apart(one, two) < 0.005


def test_values_on_a_gaussian() -> None:
    """For s(x) = -x / c: losses in closed form, and one constant between them."""
    x, w = hermite(8, 1)
    for c in (0.5, 1.0, 3.0):
        found = float((w * implicit(lambda x, c=c: -x / c, x)).sum())
        assert found == pytest.approx(-1 / c + 1 / (2 * c**2), abs=1e-10)
    # With N(0, 1) as data x_t has variance 1 as well: denoising is that and E |eps / sigma|^2 / 2.
    at = Level(*torch.tensor([0.8, 0.6], dtype=torch.float64))
    x0, eps = torch.cartesian_prod(x[:, 0], x[:, 0]).T[:, :, None]
    pairs = torch.cartesian_prod(w, w).prod(1)
    for c in (0.5, 1.0, 3.0):
        found = float((pairs * denoising(lambda x, c=c: -x / c, x0, eps, at)).sum())
        assert found == pytest.approx(-1 / c + 1 / (2 * c**2) + 1 / (2 * 0.6**2), rel=1e-10)


def test_sliced_is_implicit_on_average_and_not_per_direction() -> None:
    matrix = torch.tensor([[1.0, 0.3], [-0.8, 2.0]], dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return -(x @ matrix.T) - x**3

    x = CORRELATED.sample(200, 0)
    draw = torch.Generator().manual_seed(0)
    exact = implicit(score, x)
    v = torch.randn(2000, 200, 2, generator=draw, dtype=torch.float64)
    each = torch.stack([sliced(score, x, one) for one in v])
    error = each.std(0) / len(each) ** 0.5
    assert bool(((each.mean(0) - exact).abs() < 5 * error).all())
    assert float(error.min()) > 0
