"""Langevin dynamics: alone it keeps the weights it began with, annealed it finds those of the data
(Song & Ermon 2019, section 3.2.2 and figure 3).
"""

import math

import pytest
import torch
from torch import Tensor

from exact import CORRELATED, Mixture
from ldm.diffusion import Condition, ContinuousVP, Level, VarianceExploding
from ldm.sampling import Ddim, Langevin, ProcessSampler
from pushed import apart, at

COUNT = 800
PURE = Level(*torch.eye(2).double()[0])


def drawn(which: ProcessSampler, data: Mixture, x: Tensor, steps: int, **ends) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    cond, predict = Condition(torch.zeros(len(x), 1, 1)), data.predictor(which.target)
    return which(predict, x, cond, steps=steps, generators=draw, **ends)


def test_naive_langevin_fails_on_separated_modes_and_annealing_repairs_it() -> None:
    # The toy of the paper: weights 1/5 and 4/5, modes 14 apart, x uniform in a square around both.
    eye = torch.eye(2).double()
    modes = Mixture(
        torch.tensor([0.2, 0.8]).double(),
        torch.tensor([[-5.0, -5.0], [5.0, 5.0]]).double(),
        torch.stack([eye, eye]),
    )
    process = VarianceExploding(0.3, 20)
    x = (torch.rand(COUNT, 2, generator=torch.Generator().manual_seed(1)).double() - 0.5) * 16
    naive, annealed = (Langevin(process, "score", corrections=n, r=0.22) for n in (150, 15))
    shares = {}
    # At one level: sigma = 1 mixes within a mode as fast as it can without joining the two.
    u = math.log(1 / 0.3) / math.log(20 / 0.3)
    found = drawn(naive, modes, x, 1, start=u, stop=u)
    shares["naive"] = float(modes.responsibilities(found, PURE)[:, 0].mean())
    found = drawn(annealed, modes, torch.randn_like(x), 20)
    shares["annealed"] = float(modes.responsibilities(found, PURE)[:, 0].mean())
    error = 4 * math.sqrt(0.2 * 0.8 / COUNT)  # statistical, and all that annealing leaves
    # Half of the square belongs to either mode; where it begins is where a sample stays.
    assert shares["naive"] == pytest.approx(0.5, abs=0.07)
    assert shares["annealed"] == pytest.approx(0.2, abs=error)
    # Within a mode both are right.
    assert torch.allclose(found[found.sum(1) > 0].mean(0), modes.means[1], atol=0.15)


@pytest.mark.parametrize("name", ["langevin", "pc ve", "pc vp"])
def test_a_correlated_mixture_is_reached(name: str) -> None:
    ve, ode = VarianceExploding(0.03, 20), Ddim(ContinuousVP(), "v")
    which: ProcessSampler = {
        "langevin": Langevin(ve, "score", corrections=10, r=0.22),
        "pc ve": Langevin(ve, "score", Ddim(ve, "score", eta=1.0)),
        "pc vp": Langevin(ode.process, "v", ode),
    }[name]
    z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(2)).double()
    found = drawn(which, CORRELATED, z, 50 if name == "langevin" else 150)
    errors = apart(found, torch.full((COUNT,), 1 / COUNT).double(), CORRELATED)
    # Four standard errors, of a mean, of a variance (at most as of a Gaussian), of a share; and
    # what the steps leave, as on a Gaussian.
    std = float(CORRELATED.cov.diagonal().max()) ** 0.5
    left = torch.tensor([std, math.sqrt(2) * std**2, 0.5]) * 4 / math.sqrt(COUNT)
    assert bool((errors < left + torch.tensor([0.0, 0.05, 0.01])).all()), errors


def test_the_levels_of_ncsn() -> None:
    """Ten steps on ten nodes are at the nodes, and all of them, the first too, are corrected."""
    process, asked = VarianceExploding(0.02, 2, 10), []

    def predict(x, level, timestep, cond):
        asked.append(float(level.sigma))
        return CORRELATED.predictor("score")(x, level, timestep, cond)

    Langevin(process, "score", corrections=3)(
        predict, torch.zeros(1, 2).double(), Condition(torch.zeros(1, 1, 1)), steps=10
    )
    nodes = process.table.sigma.flip(0).repeat_interleave(3).tolist()
    assert asked == pytest.approx([*nodes, nodes[-1]])  # and the denoiser once


def test_one_correction_on_a_gaussian_is_stationary_to_its_step() -> None:
    # At one level x <- (1 - a / 2S) x + sqrt(a) z ends at the variance S / (1 - a / 4S).
    process, r = VarianceExploding(1.0, 2.0), 0.3
    data = Mixture(*(torch.tensor(p).double() for p in ([1.0], [[0.0]], [[[0.5]]])))
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)).double()
    level = at(process, 0.0)
    noised = float(0.5 + level.sigma**2)
    a = (2 * r * float(level.sigma)) ** 2
    which = Langevin(process, "score", corrections=60, r=r)
    found = drawn(which, data, z, 1, start=0.0, stop=0.0)
    expected = noised / (1 - a / (4 * noised))
    assert float(found.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / 20_000))
    assert expected / noised - 1 > 1.5 * 4 * math.sqrt(2 / 20_000)  # or this would say nothing
