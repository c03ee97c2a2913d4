"""Samplers that set out midway: on data that are one point every level lies on one line."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Condition, DiscreteVP, Level, Prediction, RectifiedFlow, scheduler_config
from ldm.guidance import LinearInverse, Replacement
from ldm.guidance.operators import inpainting
from ldm.sampling import sampler
from ldm.sampling.samplers import FLOW_SAMPLERS, PROCESS_SAMPLERS, SAMPLERS

STEPS = 10
X0 = torch.full((2, 1, 2, 2), 0.7, dtype=torch.float64)
EPS = torch.randn(X0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VP, FLOW = DiscreteVP(), RectifiedFlow(shift=3.0)
CASES = [(name, VP, "eps") for name in (*SAMPLERS, *PROCESS_SAMPLERS) if name != "langevin"]
CASES += [(name, FLOW, "velocity") for name in FLOW_SAMPLERS]
# Whose every step ends on x_t of the point, and draws nothing.
ON_THE_LINE = {"ddim", "dpm++", "euler", "unipc", "flow-euler", "ode-euler", "ode-heun"}


def knows(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
    return Prediction(x_t, level, X0.to(x_t), "x0")


@pytest.mark.parametrize(("name", "process", "target"), CASES)
def test_it_comes_to_the_point_from_any_step(name, process, target):
    which = sampler(name, scheduler_config(process, target))
    generator = torch.Generator().manual_seed(1)

    def run(begin: int) -> tuple[Tensor, list[Tensor]]:
        x, seen = which.noised(X0, EPS, steps=STEPS, begin=begin), []
        told = dict(steps=STEPS, begin=begin, generators=generator)
        x = which(knows, x, Condition(), **told, callback=lambda i, t, x: seen.append(x))
        return x, seen

    whole = run(0)[1]
    for begin in (0, 3, 9, STEPS):
        x, seen = run(begin)
        if name != "ode-adaptive":
            assert len(seen) == which.evaluations(STEPS, begin=begin)
        # What Langevin's last correction adds, and the last level of PNDM, are no rounding.
        close = {"pc": 0.05, "sde": 0.2, "pndm": 0.1}.get(name, 2e-4)
        assert float((x - X0).abs().max()) < close, (name, begin)
        if begin == STEPS:
            assert torch.equal(x, X0) and not seen
        elif begin and name in ON_THE_LINE:
            there = which.noised(X0, EPS, steps=STEPS, begin=begin)
            assert float((whole[begin - 1] - there).abs().max()) < 1e-4 * float(there.abs().max())


def test_a_beginning_that_there_is_not():
    for name in ("ddim", "ode-euler"):
        which = sampler(name, scheduler_config(VP, "eps"))
        for wrong, message in (
            ({"begin": 11}, r"begin must lie in 0..10"),
            ({"begin": 2, "denoising_start": 0.5}, "pass either begin or denoising_start"),
        ):
            with pytest.raises(ValueError, match=message):
                which(knows, X0, Condition(), steps=STEPS, **wrong)


def test_replacement_is_the_inverse_problem_of_a_mask():
    drawn = torch.zeros_like(X0)
    drawn[..., 0] = 1
    for target, process in (("v", VP), ("velocity", FLOW)):
        level = process.level(torch.tensor(0.6))

        def says(x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            return Prediction(x, level, x.sin(), target)  # noqa: B023

        guides = (
            Replacement(X0, drawn),
            LinearInverse(inpainting(1 - drawn), (1 - drawn) * X0, method="replacement"),
        )
        one, other = (
            guide(says, Condition())(EPS, level, torch.zeros(()), Condition()).x0
            for guide in guides
        )
        assert float((one - other).abs().max()) < 1e-6
        assert float(((1 - drawn) * (one - X0)).abs().max()) < 1e-6
        plain = says(EPS, level, torch.zeros(()), Condition())
        assert torch.equal((drawn * one), drawn * plain.x0)
        all_drawn = Replacement(X0, torch.ones_like(drawn))(says, Condition())
        assert torch.equal(all_drawn(EPS, level, torch.zeros(()), Condition()).y, plain.y)
