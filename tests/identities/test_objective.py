"""Weights against their closed forms, stratified times, and streams that depend on nothing else."""

from typing import get_args

import numpy as np
import pytest
import torch

from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Edm,
    Objective,
    Schedule,
    Target,
    TargetName,
    coefficients,
    normal,
    stratified,
    stream,
)

FIRST_INTEGERS = [495, 987, 970, 34]
FIRST_NORMALS = [0.2304467, -1.2009292]
COND = Condition(torch.zeros(8, 1, 1))


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_closed_forms(schedule: Schedule, gamma: float) -> None:
    level = DiscreteVP(schedule).table
    snr = level.snr
    capped = snr.clamp(max=gamma)
    forms = {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}  # Hang et al. 2023, 3.4
    for target, form in forms.items():
        weight = Objective(target, "min_snr", gamma).weight(level)  # type: ignore[arg-type]
        assert float((weight / form - 1).abs().max()) < 1e-12


def test_min_snr_at_zero_terminal_snr_is_finite() -> None:
    level = DiscreteVP(zero_terminal_snr=True).table
    weight = Objective("v", "min_snr").weight(level)
    assert bool(weight.isfinite().all()) and float(weight[-1]) == 0
    x0 = Objective("x0", "min_snr").weight(level)
    assert bool(x0.isfinite().all()) and float(x0[-1]) == 0


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_uniform_is_one_in_the_targets_own_space(target: Target) -> None:
    assert torch.equal(
        Objective(target).weight(DiscreteVP().table), torch.ones(1000, dtype=torch.float64)
    )


@pytest.mark.parametrize("target", [*get_args(TargetName), Edm()])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_loss_is_the_weighted_error_of_x0(target: Target, weighting: str) -> None:
    process, objective = DiscreteVP(), Objective(target, weighting)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    z, eps, off = torch.randn(3, 8, 4, 2, 2, generator=draw, dtype=torch.float64)
    u = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    t = process.time(u)
    wide = process.level(t).like(z)
    a, b = coefficients(target, wide)

    def truth(x_t: torch.Tensor, timestep: torch.Tensor, cond: Condition) -> torch.Tensor:
        return a * z + b * eps

    def wrong(x_t: torch.Tensor, timestep: torch.Tensor, cond: Condition) -> torch.Tensor:
        return a * z + b * eps + off

    assert float(objective(process, truth, z, COND, u=u, eps=eps).loss.abs().max()) < 1e-20
    terms = objective(process, wrong, z, COND, u=u, eps=eps)
    assert torch.allclose(terms.mse, off.square().mean((1, 2, 3)), rtol=1e-12)
    assert torch.allclose(terms.loss, objective.weight(process.level(t)) * terms.mse, rtol=1e-12)
    assert terms.loss.shape == terms.t.shape == terms.level.alpha.shape == (8,)


def test_data_need_no_four_axes() -> None:
    process = DiscreteVP()
    z, eps = torch.randn(2, 8, 5)
    terms = Objective("v")(
        process, lambda x, t, c: torch.zeros_like(x), z, COND, u=torch.rand(8), eps=eps
    )
    assert terms.loss.shape == (8,)


def test_stratified_times_hit_every_cell_once() -> None:
    for size in (1, 7, 64, 1000):
        for batch in range(20):
            u = stratified(3, "time", batch, size)
            assert sorted(np.floor(u * size).astype(int)) == list(range(size))
            assert u.min() >= 0 and u.max() < 1


def test_each_stratified_time_alone_is_uniform() -> None:
    u = np.stack([stratified(0, "time", batch, 8) for batch in range(4000)])
    for column in u.T:
        # Kolmogorov-Smirnov distance of 4,000 draws: 1.95 / sqrt(4000) is passed once in 1,000.
        grid = np.sort(column) - (np.arange(4000) + 0.5) / 4000
        assert np.abs(grid).max() < 1.95 / np.sqrt(4000)
    # The mean of a batch: variance 1 / (12 B^3) in place of 1 / (12 B).
    assert u.mean(1).var() == pytest.approx(1 / (12 * 8**3), rel=0.1)


def test_streams_do_not_depend_on_the_split_into_batches() -> None:
    one = [normal(5, "noise", i, (2, 3)) for i in range(16)]
    two = [normal(5, "noise", start + i, (2, 3)) for start in (0, 4, 8, 12) for i in range(4)]
    backwards = [normal(5, "noise", i, (2, 3)) for i in reversed(range(16))][::-1]
    assert torch.equal(torch.stack(one), torch.stack(two))
    assert torch.equal(torch.stack(one), torch.stack(backwards))
    # A longer draw begins as a shorter one does.
    assert np.array_equal(stream(5, "noise", 3).random(4), stream(5, "noise", 3).random(64)[:4])


def test_streams_differ_by_seed_name_and_index() -> None:
    keys = [
        (s, n, i) for s in (0, 1, 2**32, 2**40) for n in ("noise", "time") for i in (0, 1, 2**31)
    ]
    firsts = {key: tuple(stream(*key).integers(0, 2**63, 4)) for key in keys}
    assert len(set(firsts.values())) == len(keys)


def test_streams_leave_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    normal(0, "noise", 0, (100,))
    stratified(0, "time", 0, 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_streams_are_fixed_for_good() -> None:
    # A run that is resumed with a later version has to see the same draws.
    assert stream(0, "noise", 0).integers(0, 1000, 4).tolist() == FIRST_INTEGERS
    assert normal(0, "noise", 1, (2,)).tolist() == pytest.approx(FIRST_NORMALS, abs=1e-6)


def test_normal_is_standard() -> None:
    x = torch.stack([normal(0, "noise", i, (64,)) for i in range(1000)])
    assert abs(float(x.mean())) < 4 / 253 and abs(float(x.std()) - 1) < 4 / 358
    # Neighbours are independent.
    assert abs(float((x[1:] * x[:-1]).mean())) < 4 / 253
