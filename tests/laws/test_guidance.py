"""Guidance on exact denoisers of mixtures, where what it should give is known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exact import CORRELATED, GAUSSIAN, MIXTURE, Mixture
from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Level,
    Prediction,
    Predictor,
    RectifiedFlow,
    scheduler_config,
)
from ldm.diffusion import VarianceExploding as VE
from ldm.guidance import (
    Chain,
    ClassifierFree,
    Gradient,
    Guidance,
    LinearInverse,
    Projection,
    Threshold,
)
from ldm.guidance.inverse import Operator
from ldm.guidance.operators import colourisation, deblurring, inpainting, super_resolution
from ldm.sampling import sampler

D = torch.float64
NULL = Condition(torch.zeros(1, 1, 1, dtype=D))


def told(n: int) -> Condition:
    """A condition that ``either`` understands."""
    return Condition(torch.ones(n, 1, 1, dtype=D))


def component(data: Mixture, k: int) -> Mixture:
    return Mixture(torch.ones(1, dtype=D), data.means[k : k + 1], data.covs[k : k + 1])


def either(data: Mixture, k: int, target: str) -> Predictor:
    """The exact denoiser of component ``k`` where the condition is 1, of all where it is 0."""
    every, one = data.predictor(target), component(data, k).predictor(target)  # type: ignore[arg-type]

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        if not cond.tokens.any():
            return every(x_t, level, timestep, cond)
        both = torch.where(
            cond.tokens[:, 0] > 0,
            one(x_t, level, timestep, cond).y,
            every(x_t, level, timestep, cond).y,
        )
        return Prediction(x_t, level, both, target)  # type: ignore[arg-type]

    return predict


def exact_label(data: Mixture, k: int):
    """log p(component k | x_t), given x_t / sqrt(alpha^2 + sigma^2)."""

    def log_p(x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Tensor:
        size = (level.alpha**2 + level.sigma**2).sqrt().reshape(-1, 1)
        return data.responsibilities(x * size, level)[:, k].log()

    return log_p


def drawn(data: Mixture, process, count: int = 40) -> tuple[Tensor, Level]:
    t = torch.linspace(0.02, 0.98, count, dtype=D)
    level = process.level(t)
    x0, eps = data.sample(count, 1), torch.randn(count, data.means.shape[1], dtype=D)
    return process.perturb(x0, eps, t), level


PROCESSES = [DiscreteVP(), VE(sigma_max=20.0), RectifiedFlow()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.kind)
@pytest.mark.parametrize("target", ["eps", "v", "velocity"])
@pytest.mark.parametrize("data", [MIXTURE, CORRELATED], ids=["mixture", "correlated"])
def test_an_exact_classifier_makes_the_exact_conditional(data: Mixture, target, process) -> None:
    x, level = drawn(data, process)
    at = (x, level, level.alpha, told(len(x)))
    for k in (0, 1):
        one = component(data, k)
        guided = Gradient(exact_label(data, k))(data.predictor(target), NULL)(*at)
        assert guided.target == target
        assert torch.allclose(guided.x0, one.x0_hat(x, level), atol=1e-10, rtol=1e-8)
        # Classifier-free at w is classifier guidance from the conditional at w - 1 (Ho & Salimans
        # 2022, section 3.2), and from the unconditional at w.
        free = ClassifierFree(3.0)(either(data, k, target), NULL)(*at)
        above = Gradient(exact_label(data, k), 2.0)(one.predictor(target), NULL)(*at)
        whole = Gradient(exact_label(data, k), 3.0)(data.predictor(target), NULL)(*at)
        size = free.x0.abs().clamp(min=1)
        assert float(((free.x0 - above.x0) / size).abs().max()) < 1e-8
        assert float(((free.x0 - whole.x0) / size).abs().max()) < 1e-8


def test_a_potential_of_x0_goes_through_the_denoiser() -> None:
    """With one Gaussian, x0_hat is affine in x_t, and so the gradient of any quadratic is known."""
    x, level = drawn(GAUSSIAN, DiscreteVP())

    def log_p(x0: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Tensor:
        return -((x0 - 3.0) ** 2).sum(1) / 2

    with torch.no_grad():
        found = Gradient(log_p, 0.7, of="x0")(GAUSSIAN.predictor("eps"), NULL)(
            x, level, level.alpha, told(len(x))
        )
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    var, hat = float(GAUSSIAN.covs), GAUSSIAN.x0_hat(x, level)
    slope = alpha * var / (alpha**2 * var + sigma**2)
    assert torch.allclose(found.x0, hat + 0.7 * sigma**2 / alpha * slope * (3.0 - hat), atol=1e-9)
    assert not found.y.requires_grad


def test_where_alpha_is_0_a_gradient_says_nothing() -> None:
    """An exact potential has no gradient there, so that 0 / 0 is left out, though not right: the
    limit is the mean of the component, to which it leads from the smallest alpha on.
    """
    x, potential = torch.randn(5, 2, dtype=D), exact_label(CORRELATED, 0)

    def x0(alpha: float) -> Tensor:
        at = Level(torch.tensor(alpha, dtype=D), torch.ones((), dtype=D))
        return Gradient(potential)(CORRELATED.predictor("v"), NULL)(x, at, at.alpha, told(5)).x0

    assert torch.allclose(x0(0.0), CORRELATED.mean.expand(5, 2))
    assert torch.allclose(x0(1e-6), CORRELATED.means[:1].expand(5, 2), atol=1e-4)


@pytest.mark.parametrize("method", ["pigdm", "tweedie", "replacement"])
def test_where_alpha_is_0_an_inverse_problem_has_its_posterior(method) -> None:
    data, noise, x = isotropic(0.6), 0.3, torch.randn(5, 2, dtype=D)
    at = Level(torch.zeros((), dtype=D), torch.ones((), dtype=D))
    inverse = LinearInverse(lambda x: x @ A.T, Y, noise, method, data_std=0.6)
    found = inverse(data.predictor("v"), NULL)(x, at, at.alpha, told(5)).x0
    assert torch.allclose(found, posterior(data, A, Y, noise).mean.expand(5, 2), atol=1e-10)


# -- classifier-free --


def counted(data: Mixture):
    calls: list[int] = []
    plain = either(data, 0, "eps")

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        calls.append(len(x_t))
        return plain(x_t, level, timestep, cond)

    return predict, calls


def test_interval_is_free_outside_and_plain_inside() -> None:
    predict, calls = counted(CORRELATED)
    guided = ClassifierFree(3.0, interval=(-2.0, 2.0))(predict, NULL)
    process, x = DiscreteVP(), torch.randn(4, 2, dtype=D)
    cond, whole = told(4), ClassifierFree(3.0)(either(CORRELATED, 0, "eps"), NULL)
    for logsnr, inside in ((-3.0, False), (0.5, True), (2.5, False)):
        level = process.level(process.time_at(torch.tensor(logsnr, dtype=D)))
        found = guided(x, level, level.alpha, cond).y
        other = whole if inside else either(CORRELATED, 0, "eps")
        assert torch.allclose(found, other(x, level, level.alpha, cond).y, atol=1e-12)
    assert calls == [4, 8, 4]
    # A level per sample: each by its own.
    logsnr = torch.tensor([-3.0, 0.5, 2.5, 1.0], dtype=D)
    level = process.level(process.time_at(logsnr))
    found = guided(x, level, level.alpha, cond).y
    free, bare = (f(x, level, level.alpha, cond).y for f in (whole, either(CORRELATED, 0, "eps")))
    inside = (logsnr.abs() < 2)[:, None]
    assert torch.allclose(found, torch.where(inside, free, bare), atol=1e-12)


def test_projection() -> None:
    process, cond = DiscreteVP(), told(40)
    x, level = drawn(CORRELATED, process)
    at = (x, level, level.alpha, cond)
    plain, null = (p.x0 for p in (
        either(CORRELATED, 0, "v")(*at), either(CORRELATED, 0, "v")(x, level, level.alpha, NULL)
    ))  # fmt: skip

    def x0(**settings: float) -> Tensor:
        return ClassifierFree(4.0, projection=Projection(**settings))(
            either(CORRELATED, 0, "v"), NULL
        )(*at).x0

    free = ClassifierFree(4.0)(either(CORRELATED, 0, "v"), NULL)(*at).x0
    assert torch.allclose(x0(parallel=1.0), free, atol=1e-10)
    update = x0() - plain  # perpendicular to the conditional prediction, and what is left of it
    assert float((update * plain).sum(1).abs().max()) < 1e-9
    along = plain / plain.norm(dim=1, keepdim=True)
    gap = plain - null
    expected = gap - (gap * along).sum(1, keepdim=True) * along
    assert torch.allclose(update, 3 * expected, atol=1e-9)
    short = x0(parallel=1.0, radius=0.1) - plain
    longest = torch.minimum(gap.norm(dim=1), torch.tensor(0.1, dtype=D))
    assert torch.allclose(short.norm(dim=1), 3 * longest, atol=1e-9)
    # The running sum: gap, then gap - gap / 2, and a new predictor begins anew.
    for _ in range(2):
        guided = ClassifierFree(4.0, projection=Projection(1.0, momentum=-0.5))(
            either(CORRELATED, 0, "v"), NULL
        )
        steps = [guided(*at).x0 - plain for _ in range(2)]
        assert torch.allclose(steps[0], 3 * gap, atol=1e-9)
        assert torch.allclose(steps[1], 1.5 * gap, atol=1e-9)


# -- thresholds --


def test_thresholds() -> None:
    level = DiscreteVP().level(torch.tensor([0.3, 0.9]))
    x0 = torch.stack([torch.linspace(-3, 3, 101), torch.linspace(-0.5, 0.5, 101)])
    x_t = level.alpha[:, None].float() * x0

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, torch.zeros_like(x_t), "eps")

    def found(threshold: Threshold) -> Prediction:
        return threshold(predict, NULL)(x_t, level, level.alpha, told(2))

    assert torch.allclose(found(Threshold()).x0, x0.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(found(Threshold(2.0)).x0, x0.clamp(-2, 2), atol=1e-5)
    dynamic = found(Threshold(percentile=0.9)).x0  # 90 % of |x0| of the first are below 2.7
    assert torch.allclose(dynamic[0], (x0[0] / 2.7).clamp(-1, 1), atol=1e-4)
    assert torch.equal(found(Threshold(percentile=0.9)).y[1], torch.zeros(101))  # nothing to clip


# -- linear inverse problems --

A = torch.tensor([[1.0, 0.4]], dtype=D)
Y = torch.tensor([[0.9]], dtype=D)


def posterior(data: Mixture, a: Tensor, y: Tensor, noise: float) -> Mixture:
    """p(x0 | y = A x0 + n), a mixture again, by Kalman's update of every component."""
    eye = torch.eye(len(a), dtype=D)
    weights, means, covs = [], [], []
    for w, m, c in zip(data.weights, data.means, data.covs, strict=True):
        s = a @ c @ a.T + noise**2 * eye
        gain, off = c @ a.T @ torch.linalg.inv(s), y[0] - a @ m
        weights.append(w.log() - (off @ torch.linalg.solve(s, off) + torch.logdet(s)) / 2)
        means.append(m + gain @ off)
        covs.append(c - gain @ a @ c)
    return Mixture(torch.stack(weights).softmax(0), torch.stack(means), torch.stack(covs))


def isotropic(std: float) -> Mixture:
    mean = torch.tensor([[0.5, -0.3]], dtype=D)
    return Mixture(torch.ones(1, dtype=D), mean, std**2 * torch.eye(2, dtype=D)[None])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.kind)
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    "method, data", [("pigdm", isotropic(0.6)), ("tweedie", component(CORRELATED, 0))],
    ids=["pigdm", "tweedie"],
)  # fmt: skip
def test_gaussian_data_have_their_exact_posterior(method, data: Mixture, noise, process) -> None:
    x, level = drawn(data, process)
    inverse = LinearInverse(lambda x: x @ A.T, Y, noise, method, data_std=0.6)
    with torch.no_grad():
        found = inverse(data.predictor("eps"), NULL)(x, level, level.alpha, told(len(x)))
    truth = posterior(data, A, Y, noise)
    assert torch.allclose(found.x0, truth.x0_hat(x, level), atol=1e-10, rtol=1e-7)


def push(guidance: Guidance, data: Mixture, end: Mixture, steps: int = 60) -> Tensor:
    """Samples of dpm++ from the exact p_T of ``end``, with its own times."""
    process, count = DiscreteVP(), 4000
    named = sampler("dpm++", scheduler_config(process, "eps"))
    scheduler = named.start(steps)
    level = named.level(scheduler, scheduler.timesteps[0])
    x = end.noised(float(level.alpha), float(level.sigma)).sample(count, 5)
    return named(guidance(data.predictor("eps"), NULL), x, told(count), steps=steps)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_samples_have_the_posterior_mean_and_covariance() -> None:
    data, noise = component(CORRELATED, 0), 0.2
    truth = posterior(data, A, Y, noise)
    x = push(LinearInverse(lambda x: x @ A.T, Y, noise, "tweedie"), data, truth)
    # 4000 samples, and the error of dpm++ at 60 steps, which is 1 % of a standard deviation.
    spread = truth.cov.diagonal().sqrt()
    assert float(((x.mean(0) - truth.mean) / spread).abs().max()) < 4 / math.sqrt(4000) + 0.01
    assert torch.allclose(x.T.cov(), truth.cov, atol=0.08 * float(truth.cov.abs().max()))


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_on_a_mixture_the_guess_is_near_and_better_than_none() -> None:
    """Not Gaussian at high noise, so not exact: how far off it is, is stated."""
    noise, a = 0.2, torch.tensor([[1.0, 0.0]], dtype=D)
    y = torch.tensor([[0.4]], dtype=D)
    truth = posterior(CORRELATED, a, y, noise)
    error = {}
    for method in ("pigdm", "tweedie"):
        guidance = LinearInverse(lambda x: x @ a.T, y, noise, method)
        x = push(guidance, CORRELATED, CORRELATED)
        error[method] = float((x.mean(0) - truth.mean).abs().max())
    prior = float((CORRELATED.mean - truth.mean).abs().max())
    assert error == pytest.approx({"pigdm": 0.29, "tweedie": 0.31}, abs=0.05)
    assert prior > 0.7


def test_replacement_keeps_what_is_known() -> None:
    mask = torch.tensor([1.0, 0.0], dtype=D)
    x, level = drawn(CORRELATED, DiscreteVP())
    y = torch.tensor([[0.4, 0.0]], dtype=D)
    with torch.no_grad():
        found = LinearInverse(inpainting(mask), y, method="replacement")(
            CORRELATED.predictor("eps"), NULL
        )(x, level, level.alpha, told(len(x)))
    assert torch.allclose(found.x0[:, 0], torch.full((40,), 0.4, dtype=D), atol=1e-9)
    assert torch.allclose(found.x0[:, 1], CORRELATED.x0_hat(x, level)[:, 1], atol=1e-9)


@pytest.mark.parametrize("method", ["pigdm", "tweedie", "replacement"])
def test_what_fills_the_hole_of_y_is_left_out(method) -> None:
    """No x0 has it as its A x0: the known is met as exactly as without."""
    x, level = drawn(CORRELATED, DiscreteVP())
    y, mask = torch.tensor([[0.4, -1.0]], dtype=D), torch.tensor([1.0, 0.0], dtype=D)
    filled, empty = (
        LinearInverse(inpainting(mask), y * part, method=method)(CORRELATED.predictor("eps"), NULL)(
            x, level, level.alpha, told(len(x))
        ).x0
        for part in (torch.ones(2, dtype=D), mask)
    )
    assert torch.allclose(filled, empty, atol=1e-9)
    if method != "pigdm":  # whose equation for v has another K than what v is multiplied by
        assert torch.allclose(filled[:, 0], torch.full((40,), 0.4, dtype=D), atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_out_of_reach_behind_an_operator_that_rounds(iterations: int) -> None:
    """Gray, three times over, and y of colour: what is out of reach is only nearly so."""

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, torch.zeros_like(x_t), "x0")

    level = DiscreteVP().level(torch.tensor(0.5, dtype=D))
    y, gray = picture().float(), colourisation()
    inverse = LinearInverse(
        lambda x: gray(x).expand(-1, 3, -1, -1), y, method="replacement", iterations=iterations
    )
    found = inverse(predict, NULL)(y, level, level.alpha, told(2)).x0
    nearest = y.mean(1, keepdim=True)  # of all gray pictures
    assert float((gray(found) - nearest).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_operator_in_half_precision(dtype: torch.dtype) -> None:
    """The sum of the squares of this y is 90,000 and more, which is infinite in float16."""

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, torch.zeros_like(x_t), "x0")

    level = DiscreteVP().level(torch.tensor(0.5, dtype=D))
    y = picture().float().repeat(1, 1, 4, 4) * 8
    assert float(y.square().flatten(1).sum(1).min()) > 90_000
    means = super_resolution(4)
    inverse = LinearInverse(
        lambda x: means(x).to(dtype), means(y) * 16, method="replacement"
    )  # the operator's values are of the size of y's
    found = inverse(predict, NULL)(y, level, level.alpha, told(2)).x0
    off = means(found) - means(y) * 16
    assert float(off.abs().max()) < 4 * torch.finfo(dtype).eps * float(means(y).abs().max()) * 16


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "operator, rounds",
    [
        (inpainting((picture()[:1, :1] > 0).double()), 1),
        (super_resolution(4), 1),
        (colourisation(), 1),
        (deblurring(0.8), 60),
    ],
    ids=["inpainting", "super-resolution", "colourisation", "deblurring"],
)
def test_operators_of_pictures_are_met(operator: Operator, rounds: int) -> None:
    """A x0 = y after a replacement, in as many conjugate residuals as A A^T has eigenvalues."""
    true, other = picture(), picture().flip(0)
    x, z = torch.randn(2, 2, 3, 8, 8, dtype=D, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(operator(2 * x - z), 2 * operator(x) - operator(z))  # linear
    level = DiscreteVP().level(torch.tensor(0.5, dtype=D))

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, other, "x0")

    inverse = LinearInverse(operator, operator(true), method="replacement", iterations=rounds)
    found = inverse(predict, NULL)(other, level, level.alpha, told(2)).x0
    assert float((operator(found) - operator(true)).abs().max()) < 1e-3
    few = replace(inverse, iterations=0)(predict, NULL)(other, level, level.alpha, told(2)).x0
    assert float((operator(few) - operator(true)).abs().max()) > 0.1


def test_blur_and_gray_are_what_they_say() -> None:
    flat = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(deblurring(1.5)(flat), flat, atol=1e-6)
    dot = torch.zeros(1, 3, 15, 15, dtype=D)
    dot[..., 7, 7] = 1
    seen, places = deblurring(1.2)(dot)[0, 0], torch.arange(15, dtype=D) - 7
    assert float(seen.sum()) == pytest.approx(1)
    assert float((seen * places**2).sum()) == pytest.approx(1.2**2, rel=0.03)  # of one axis
    assert torch.allclose(colourisation()(flat), torch.full((1, 1, 9, 9), 0.3), atol=1e-6)


def test_what_does_not_fit_is_told() -> None:
    x, level = drawn(CORRELATED, DiscreteVP())
    at = (x, level, level.alpha, told(len(x)))
    wrong = LinearInverse(lambda x: x @ A.T, torch.zeros(3, 1, dtype=D))
    with pytest.raises(ValueError, match=r"y has shape \(3, 1\) and the operator gives \(40, 1\)"):
        wrong(CORRELATED.predictor("eps"), NULL)(*at)
    inner = Gradient(exact_label(CORRELATED, 0))
    chain = Chain((inner, LinearInverse(lambda x: x @ A.T, Y)))
    with pytest.raises(ValueError, match="cannot wrap another one"):
        chain(CORRELATED.predictor("eps"), NULL)(*at)


def test_a_chain_is_composition() -> None:
    x, level = drawn(CORRELATED, DiscreteVP())
    at, predict = (x, level, level.alpha, told(len(x))), either(CORRELATED, 1, "eps")
    free, inverse = ClassifierFree(2.0), LinearInverse(lambda x: x @ A.T, Y, 0.1)
    found = Chain((free, inverse, Threshold(1.0)))(predict, NULL)(*at)
    by_hand = Threshold(1.0)(inverse(free(predict, NULL), NULL), NULL)(*at)
    assert torch.equal(found.y, by_hand.y)
    assert float(found.x0.abs().max()) <= 1 + 1e-6
    assert Chain(())(predict, NULL) is predict
