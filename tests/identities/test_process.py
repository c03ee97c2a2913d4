"""x_t = alpha x0 + sigma eps: 1,000 levels in float32, and only then the cast."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm.diffusion import (
    DiscreteVP,
    Schedule,
    TrainedVP,
    process_of,
    scheduler_config,
)

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T = (torch.arange(1000).double() + 1) / 1000  # the nodes
ZERO, ONE = torch.zeros(1000, 1), torch.ones(1000, 1)


def processes() -> list[DiscreteVP]:
    return [
        DiscreteVP(schedule, *betas, zero_terminal_snr=zero)
        for schedule, betas in (
            ("linear", (0.0001, 0.02)),
            ("linear", (0.0015, 0.0195)),
            ("scaled_linear", (0.00085, 0.012)),
            ("cosine", ()),
        )
        for zero in (False, True)
    ]


def name(process: DiscreteVP) -> str:
    zero = "-zero" if process.zero_terminal_snr else ""
    return f"{process.schedule}-{process.beta_end}{zero}"


@pytest.fixture(params=processes(), ids=name)
def process(request: pytest.FixtureRequest) -> DiscreteVP:
    return request.param


def test_table(process: DiscreteVP) -> None:
    alpha, sigma, *_ = process.table
    assert alpha.dtype == sigma.dtype == torch.float64 and len(alpha) == 1000
    assert float((alpha**2 + sigma**2 - 1).abs().max()) < 1e-15
    assert bool((alpha.diff() < 0).all()) and bool((sigma.diff() >= 0).all())
    assert (float(alpha[-1]) == 0) == process.zero_terminal_snr
    if process.zero_terminal_snr:
        assert float(sigma[-1]) == 1
        plain = DiscreteVP(process.schedule, process.beta_start, process.beta_end).table
        assert float(alpha[0]) == pytest.approx(float(plain.alpha[0]), abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_noise_really_added(process: DiscreteVP, dtype: torch.dtype) -> None:
    # What perturb makes of x0 = 0, eps = 1 is sigma, of x0 = 1, eps = 0 it is alpha. The operands
    # arrive in the compute dtype, as under autocast; 0 and 1 are exact in it.
    zero, one = ZERO.to(dtype), ONE.to(dtype)
    sigma = process.perturb(zero, one, T, dtype=torch.float32)[:, 0]
    alpha = process.perturb(one, zero, T, dtype=torch.float32)[:, 0]
    assert sigma.dtype == alpha.dtype == torch.float32
    levels = set(zip(alpha.tolist(), sigma.tolist(), strict=True))
    assert len(levels) == 1000
    assert bool((sigma.diff() >= 0).all()) and bool((alpha.diff() <= 0).all())
    assert (
        float(sigma[0]) > 0.006 and float((alpha.double() - process.table.alpha).abs().max()) < 6e-8
    )
    assert float((sigma.double() - process.table.sigma).abs().max()) < 6e-8
    # After the cast: the nearest number of the dtype to each of them, no more and no less.
    cast = process.perturb(zero, one, T)[:, 0]
    assert cast.dtype == dtype
    assert torch.equal(cast, sigma.to(dtype))
    assert torch.equal(process.perturb(one, zero, T)[:, 0], alpha.to(dtype))
    assert float(cast[0]) > 0.006 and bool((cast.diff() >= 0).all())


def test_diffusers_add_noise_is_why(process: DiscreteVP) -> None:
    scheduler = DDPMScheduler.from_config(scheduler_config(process, "v"))
    theirs = scheduler.add_noise(ZERO.bfloat16(), ONE.bfloat16(), torch.arange(1000))[:, 0]
    assert theirs.unique().numel() < 260  # of 1,000
    if process.schedule == "scaled_linear" and not process.zero_terminal_snr:
        assert float(theirs[0]) == float(theirs[1]) == 0
        ours = process.perturb(ZERO.bfloat16(), ONE.bfloat16(), T)[:, 0]
        assert float(ours[0]) == pytest.approx(0.02915, rel=0.01)


def test_one_draw_is_the_formula(process: DiscreteVP) -> None:
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 4, 2, 2, generator=draw)
    level = process.table.like(x0.double())
    exact = level.alpha * x0.double() + level.sigma * eps.double()
    assert float((process.perturb(x0, eps, T).double() - exact).abs().max()) < 1e-6
    half = process.perturb(x0, eps, T, dtype=torch.bfloat16)
    assert torch.equal(half, process.perturb(x0, eps, T).bfloat16())


def test_scheduler_config_round_trip(process: DiscreteVP) -> None:
    config = scheduler_config(process, "v")
    assert process_of(config) == process
    scheduler = DDIMScheduler.from_config(config)
    assert process_of(scheduler.config) == process
    assert scheduler.config["prediction_type"] == "v_prediction"


def test_table_is_diffusers_own(process: DiscreteVP) -> None:
    mine = process.table.alpha**2
    for kind in (DDIMScheduler, DDPMScheduler):
        theirs = kind.from_config(scheduler_config(process, "v")).alphas_cumprod.double()
        error = (theirs - mine).abs()
        assert bool((error <= torch.maximum(2e-6 * mine, torch.tensor(1e-7))).all())


@pytest.mark.parametrize("zero", [False, True])
def test_trained_betas_are_a_table(zero: bool) -> None:
    betas = torch.linspace(0.02, 0.2, 40).tolist()
    config = scheduler_config(DiscreteVP(), "v") | {
        "num_train_timesteps": 40, "trained_betas": betas, "rescale_betas_zero_snr": zero,
    }  # fmt: skip
    process = process_of(config)
    assert isinstance(process, TrainedVP) and process.num_train_timesteps == 40
    theirs = DDIMScheduler.from_config(config).alphas_cumprod.double()
    assert float((process.table.alpha**2 - theirs).abs().max()) < 1e-6
    assert (float(process.table.alpha[-1]) == 0) is zero
    # What is saved again is the same table.
    again = process_of(scheduler_config(process, "v"))
    assert torch.allclose(again.table.alpha, process.table.alpha, atol=1e-7)
    nodes = (torch.arange(39).double() + 1) / 40
    assert torch.allclose(process.time_at(process.table.logsnr[:-1]), nodes, atol=1e-6)


def test_keys_without_a_meaning_are_named() -> None:
    config = scheduler_config(DiscreteVP(), "eps")
    for betas in ([0.1] * 10, [], ["a"] * 1000, 3, [0.1] * 999 + [1.5], [0.0] + [0.1] * 999):
        with pytest.raises(ValueError, match="trained_betas"):
            process_of({**config, "trained_betas": betas})
    with pytest.raises(ValueError, match="sigmoid"):
        process_of({**config, "beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="score"):
        scheduler_config(DiscreteVP(), "score")


def test_time_falls_into_equal_cells_of_which_each_has_a_node() -> None:
    process = DiscreteVP()
    middles = (torch.arange(1000).double() + 0.5) / 1000
    assert torch.equal(process.time(middles), T)
    ends = torch.tensor([0.0, 0.0009999999, 0.001, 0.9999999999, 1.0], dtype=torch.float64)
    assert process.time(ends).tolist() == [0.001, 0.001, 0.002, 1.0, 1.0]
    # The embedding computes in float32, where these are stock's integers.
    assert process.timestep(T).float().tolist() == list(range(1000))
