"""y = a x0 + b eps and back, over every schedule and all pairs of targets, in float64."""

import itertools
from typing import get_args

import pytest
import torch

from ldm.diffusion import (
    DiscreteVP,
    Edm,
    Level,
    Prediction,
    Schedule,
    Target,
    TargetName,
    coefficients,
    determinant,
)

TARGETS: tuple[Target, ...] = (*get_args(TargetName), Edm(), Edm(1.3))
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
PAIRS = list(itertools.product(TARGETS, TARGETS))


def levels(schedule: Schedule, zero: bool) -> Level:
    return DiscreteVP(schedule, zero_terminal_snr=zero).table


def pair(level: Level) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Level]:
    """(x0, eps, x_t) of shape 1000 x 3 and the level broadcast to it."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 3, generator=draw, dtype=torch.float64)
    wide = level.like(x0)
    return x0, eps, wide.alpha * x0 + wide.sigma * eps, wide


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("spoken, wanted", PAIRS)
def test_every_pair_of_targets_agrees(
    schedule: Schedule, zero: bool, spoken: Target, wanted: Target
) -> None:
    level = levels(schedule, zero)
    x0, eps, x_t, wide = pair(level)
    known = determinant(spoken, level) != 0
    assert int((~known).sum()) == (1 if zero and spoken in ("eps", "score") else 0)

    def truth(target: Target) -> torch.Tensor:
        a, b = coefficients(target, wide)
        return a * x0 + b * eps

    got = Prediction(x_t, level, truth(spoken), spoken).as_(wanted)
    # The condition number of reading one as the other: sigma / |d|, up to 1e4 where alpha -> 0.
    scale = (1 + level.sigma / determinant(spoken, level).abs())[:, None]
    scale = scale * (1 + truth(wanted).abs())
    assert float(((got - truth(wanted)).abs() / scale)[known].max()) < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("first, second", [p for p in PAIRS if p[0] != p[1]])
def test_cycles_return(schedule: Schedule, first: Target, second: Target) -> None:
    level = levels(schedule, False)
    _, _, x_t, _ = pair(level)
    y = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there = Prediction(x_t, level, y, first).as_(second)
    back = Prediction(x_t, level, there, second).as_(first)
    assert float((back - y).abs().max()) < 1e-10


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_network_speaks_is_untouched(target: Target) -> None:
    level = levels("scaled_linear", False)
    y = torch.randn(1000, 3).bfloat16()
    assert Prediction(torch.randn(1000, 3), level, y, target).as_(target) is y


def test_closed_forms() -> None:
    level = Level(
        torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    )
    x0, eps = (
        torch.tensor([[2.0]], dtype=torch.float64),
        torch.tensor([[-1.0]], dtype=torch.float64),
    )
    prediction = Prediction(0.6 * x0 + 0.8 * eps, level, x0, "x0")
    assert float(prediction.eps) == pytest.approx(-1.0, abs=1e-14)
    assert float(prediction.as_("v")) == pytest.approx(0.6 * -1 - 0.8 * 2, abs=1e-14)
    assert float(prediction.as_("score")) == pytest.approx(1 / 0.8, abs=1e-14)


def test_eps_and_score_are_refused_at_zero_terminal_snr() -> None:
    process = DiscreteVP(zero_terminal_snr=True)
    for target in ("eps", "score"):
        with pytest.raises(ValueError, match="zero_terminal_snr"):
            process.refuse(target)  # type: ignore[arg-type]
    for target in ("v", "x0"):
        process.refuse(target)  # type: ignore[arg-type]
    for target in TARGETS:
        DiscreteVP().refuse(target)
