"""Steps along the probability-flow ODE, dx_t = x0_hat d alpha + eps_hat d sigma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.integrate import DOP853
from torch import Tensor

from ldm.diffusion.flow import angle, flow, size, when
from ldm.diffusion.level import typed
from ldm.sampling.process_sampler import ProcessSampler, Run


@dataclass(frozen=True)
class Heun(ProcessSampler):
    """The trapezoidal rule on the level itself, whatever its clock; two evaluations a step.

    It is Heun's method in t for the ODE (Karras et al. 2022, algorithm 1) but for the mean of the
    rates alpha' and sigma', which is replaced by the exact change of alpha and sigma. So nothing is
    lost where sigma grows as the square root of t.
    """

    order: ClassVar[int] = 2

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the class."""
        d_alpha, d_sigma = run.factors(x, t, s)

        def change(x: Tensor, t: Tensor) -> Tensor:
            x0, eps = run.ends(x, t)
            return typed(d_alpha * x0 + d_sigma * eps, x.dtype)

        first = change(x, t)
        return x + (first + change(x + first, s)) / 2


@dataclass(frozen=True)
class Adaptive(ProcessSampler):
    """Dormand & Prince's method of order 8, DOP853 of SciPy, in the coordinates of
    ``ldm.diffusion.flow``.

    Its steps are its own, shared by the batch: ``steps`` is only how many the first one would be
    of. It calls the network dozens to hundreds of times. The callback is called after each of its
    steps, and begins it anew by replacing x.

    Args:
        tolerance: of the error of a step, relative to x and absolute.
    """

    tolerance: float = 1e-5

    order: ClassVar[int] = 8

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the class."""
        return self.walk(run, x, torch.stack([t, s]))

    def walk(self, run: Run, x: Tensor, times: Tensor) -> Tensor:
        """``x`` at the first time brought to the last."""
        end = angle(self.process.level(times[-1]))

        def tensor(y: Any) -> Tensor:
            return torch.from_numpy(y).to(x.dtype).to(x.device).reshape(x.shape)

        def array(x: Tensor) -> Any:
            return x.detach().cpu().double().flatten().numpy()

        slope = flow(self.process, run.predict, run.cond)

        def rates(phi: float, y: Any) -> Any:
            found = slope(phi, tensor(y))
            if not bool(found.isfinite().all()):  # no step is small enough, and all are tried
                raise ValueError("the ODE of this network cannot be solved: it is nan or inf")
            return array(found)

        def begun(phi: float, x: Tensor, t: Tensor) -> Any:
            return DOP853(
                rates,
                phi,
                array(x / size(self.process.level(t))),
                end,
                rtol=self.tolerance,
                atol=self.tolerance,
                first_step=abs(end - phi) / len(times),
            )

        index, t, solver = 0, times[0], None
        phi = angle(self.process.level(t))
        while phi != end:
            solver = solver or begun(phi, x, t)
            told = solver.step()
            if told is not None:
                raise ValueError(
                    f"{told} The ODE of this network cannot be solved to {self.tolerance}"
                )
            before, phi = t, float(solver.t)
            t = times[-1] if phi == end else when(self.process, phi)
            there = tensor(solver.y) * size(self.process.level(t))
            x = run.seen(index, there, before)
            solver, index = solver if x is there else None, index + 1
        return x


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise ``a`` (share 0) to ``b`` (1) on the arc between them, per sample ``b ...``.

    All points are as long as noise is, which those of a straight line are not (Song et al. 2021a,
    appendix D.5).
    """
    one, two = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(one, two)
    theta = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos().reshape(-1, *(1,) * (a.ndim - 1))
    return (((1 - share) * theta).sin() * a + (share * theta).sin() * b) / theta.sin()
