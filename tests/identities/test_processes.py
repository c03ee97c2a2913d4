"""Every process: derivatives, its SDE, the inverse, the prior, and its words in diffusers."""

import math

import pytest
import torch

from ldm.diffusion import (
    ContinuousVP,
    Cosine,
    DiscreteVP,
    Edm,
    NoiseProcess,
    RectifiedFlow,
    Target,
    VarianceExploding,
    VariancePreserving,
    coefficients,
    process_of,
    scheduler_config,
    target_of,
)

PROCESSES: dict[str, NoiseProcess] = {
    "discrete": DiscreteVP(),
    "discrete cosine": DiscreteVP("cosine"),
    "discrete zero": DiscreteVP(zero_terminal_snr=True),
    "vp": ContinuousVP(),
    "cosine": Cosine(),
    "ve": VarianceExploding(),
    "rectified flow": RectifiedFlow(shift=3.0),
}
T = torch.linspace(0, 1, 2014, dtype=torch.float64)  # none but the ends is a node
INNER = T[1:-1]


@pytest.fixture(params=PROCESSES)
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return PROCESSES[request.param]


def test_derivatives_are_those_of_autograd(process: NoiseProcess) -> None:
    t = INNER.clone().requires_grad_()
    level = process.level(t)
    for part, rate in ((level.alpha, level.d_alpha), (level.sigma, level.d_sigma)):
        (exact,) = torch.autograd.grad((part + 0 * t).sum(), t, retain_graph=True)
        assert rate is not None and part.dtype == rate.dtype == torch.float64
        assert torch.allclose(rate.detach(), exact, rtol=1e-12, atol=1e-12)
    # And by differences, which know nothing of the formula: alpha falls, sigma rises.
    h = 1e-7
    ahead, behind = process.level(INNER + h), process.level(INNER - h)
    smooth = ((INNER * 1000) % 1 - 0.5).abs() < 0.49  # no kink of an interpolant within h
    slope = (ahead.sigma - behind.sigma) / (2 * h)
    assert float(((slope / process.level(INNER).d_sigma - 1).abs())[smooth].max()) < 1e-5
    assert bool((ahead.alpha <= behind.alpha).all())


def test_nothing_is_nan_from_end_to_end(process: NoiseProcess) -> None:
    level = process.level(T)
    for part in (*level, level.snr, level.logsnr, *process.sde(T), process.timestep(T)):
        assert part is not None and not bool(part.isnan().any())
    f, g2 = process.sde(INNER)
    assert bool((f <= 0).all()) and bool((g2 > 0).all()) and bool(g2.isfinite().all())


def test_sde_has_these_marginals(process: NoiseProcess) -> None:
    # d var / dt = 2 f var + g^2 and d mean / dt = f mean, for data of any variance.
    level, (f, g2) = process.level(INNER), process.sde(INNER)
    assert level.d_alpha is not None and level.d_sigma is not None
    for data in (0.0, 0.25, 4.0):
        variance = level.alpha**2 * data + level.sigma**2
        rate = 2 * (level.alpha * level.d_alpha * data + level.sigma * level.d_sigma)
        assert torch.allclose(2 * f * variance + g2, rate, rtol=1e-9, atol=1e-9)


def test_sde_of_vp_and_ve_are_those_of_the_paper() -> None:
    f, g2 = ContinuousVP(0.1, 20).sde(INNER)
    beta = 0.1 + INNER * 19.9
    assert torch.allclose(f, -beta / 2, rtol=1e-12) and torch.allclose(g2, beta, rtol=1e-12)
    f, g2 = VarianceExploding(0.01, 50).sde(INNER)
    sigma = 0.01 * 5000**INNER
    assert float(f.abs().max()) == 0
    assert torch.allclose(g2, 2 * sigma**2 * math.log(5000), rtol=1e-12)  # eq. 30


def test_discrete_tables_are_nodes_of_an_interpolant_of_log_alpha() -> None:
    for process in (DiscreteVP("linear", 0.0001, 0.02), DiscreteVP(), DiscreteVP("cosine")):
        nodes = torch.cat([torch.zeros(1).double(), process.table.alpha.log()])
        w = torch.tensor([0.25, 0.5, 0.9]).double()
        for cell in (0, 1, 500, 999):
            between = nodes[cell] + w * (nodes[cell + 1] - nodes[cell])
            level = process.level((cell + w) / 1000)
            assert torch.allclose(level.alpha.log(), between, rtol=1e-12)
            slope = (nodes[cell + 1] - nodes[cell]) * 1000
            assert torch.allclose(level.d_alpha / level.alpha, slope.expand(3), rtol=1e-9)
            assert torch.allclose(level.d_sigma, -level.alpha * level.d_alpha / level.sigma)
    # A discrete linear table is the OU process at its nodes, up to its steps of 1/1000.
    ou, table = ContinuousVP(0.1, 20).table, DiscreteVP("linear", 0.0001, 0.02).table
    assert float((ou.alpha - table.alpha).abs().max()) < 3e-3


def test_time_at_is_the_inverse_of_level(process: NoiseProcess) -> None:
    assert torch.allclose(process.time_at(process.level(T).logsnr), T, atol=1e-12)
    beyond = process.time_at(torch.tensor([-math.inf, math.inf, -1e3, 1e3]))
    assert torch.allclose(beyond, torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), atol=1e-7)


def test_prior() -> None:
    assert DiscreteVP().prior_std() == pytest.approx(1, abs=1e-12)
    assert ContinuousVP().prior_std(0.0) == pytest.approx(0.99997841, abs=1e-8)
    assert Cosine().prior_std(7.0) == RectifiedFlow().prior_std(7.0) == 1
    assert VarianceExploding(0.01, 50).prior_std(2.0) == pytest.approx(math.hypot(2, 50))


def test_shift_is_a_clock_and_leaves_path_and_velocity() -> None:
    u = torch.linspace(0, 1, 11)
    plain, shifted = RectifiedFlow(), RectifiedFlow(shift=3.0)
    assert torch.equal(plain.level(u).sigma, shifted.level(u).sigma)
    s = shifted.time(u)
    # Three times the ratio of sigma to alpha at the same u.
    assert torch.allclose(s / (1 - s), 3 * u.double() / (1 - u.double()))
    a, b = coefficients("velocity", shifted.level(s))
    assert torch.equal(a, -torch.ones_like(a)) and torch.equal(b, torch.ones_like(b))


LEGAL: list[tuple[NoiseProcess, Target]] = [
    *[(p, t) for p in (ContinuousVP(0.2, 15, 500), DiscreteVP()) for t in ("eps", "v", "x0")],  # type: ignore[list-item]
    (Cosine(), "v"),
    (VarianceExploding(0.02, 30), "score"),
    (VarianceExploding(0.002, 80), Edm(0.5)),
    (RectifiedFlow(shift=3.0), "velocity"),
]


@pytest.mark.parametrize("process, target", LEGAL, ids=lambda x: str(getattr(x, "kind", x)))
def test_stock_loads_what_a_folder_says_and_it_reads_back(process, target, tmp_path) -> None:
    import diffusers

    config = scheduler_config(process, target)
    scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert process_of(loaded.config) == process
    assert target_of(loaded.config) == target
    if isinstance(process, VariancePreserving):
        theirs = loaded.alphas_cumprod.double()
        assert float((theirs - process.table.alpha**2).abs().max()) < 2e-6


@pytest.mark.parametrize(
    "process, target, reason",
    [
        (RectifiedFlow(), "eps", "at t = 1 of process 'rectified_flow': use target 'velocity'"),
        (Cosine(), "score", "at t = 1 of process 'cosine'"),
        (DiscreteVP(zero_terminal_snr=True), "eps", "zero_terminal_snr"),
    ],
)
def test_targets_that_say_nothing_at_the_end(process, target, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        process.refuse(target)
    for legal in ("v", "x0", "velocity", Edm()):
        process.refuse(legal)


def test_what_no_scheduler_can_say() -> None:
    for process, target in (
        (RectifiedFlow(), "v"), (VarianceExploding(), "eps"), (DiscreteVP(), "velocity"),
        (DiscreteVP(), Edm()), (ContinuousVP(), "score"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot express target .* of process"):
            scheduler_config(process, target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learned variance .* not to process 've'"):
        scheduler_config(VarianceExploding(), "score", learned_variance=True)
    flow = {"base_image_seq_len": 256, "shift": 3.0, "num_train_timesteps": 1000}
    assert process_of(flow) == RectifiedFlow(3.0) and target_of(flow) == "velocity"
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        process_of({**flow, "use_dynamic_shifting": True})
