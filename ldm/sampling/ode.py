"""Steps along the probability-flow ODE, dx_t = x0_hat d alpha + eps_hat d sigma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.integrate import DOP853
from torch import Tensor

from ldm.diffusion.flow import angle, flow, size
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
        level, after = self.process.level(t), self.process.level(s)
        d_alpha, d_sigma = float(after.alpha - level.alpha), float(after.sigma - level.sigma)

        def change(x: Tensor, t: Tensor) -> Tensor:
            found = run.at(x, t)
            return (d_alpha * found.x0 + d_sigma * found.eps).to(x.dtype)

        first = change(x, t)
        return x + (first + change(x + first, s)) / 2


@dataclass(frozen=True)
class Adaptive(ProcessSampler):
    """Dormand & Prince's method of order 8, DOP853 of SciPy, in the coordinates of
    ``ldm.diffusion.flow``.

    Its steps are its own, shared by the batch: ``steps`` is only how many the first one would be
    of. It calls the network dozens to hundreds of times.

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
        level, after = self.process.level(times[0]), self.process.level(times[-1])
        begin, end = angle(level), angle(after)
        if begin == end:
            return x

        def tensor(y: Any) -> Tensor:
            return torch.from_numpy(y).to(x).reshape(x.shape)

        slope = flow(self.process, run.predict, run.cond)

        def rates(phi: float, y: Any) -> Any:
            return slope(phi, tensor(y)).double().flatten().cpu().numpy()

        solver: Any = DOP853(
            rates,
            begin,
            (x / size(level)).double().flatten().cpu().numpy(),
            end,
            rtol=self.tolerance,
            atol=self.tolerance,
            first_step=abs(end - begin) / len(times),
        )
        index = 0
        while solver.status == "running":
            told = solver.step()
            if told is not None:
                raise ValueError(
                    f"{told} The ODE of this network cannot be solved to {self.tolerance}"
                )
            run.seen(index, tensor(solver.y), times[0])
            index += 1
        return tensor(solver.y) * size(after)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise ``a`` (share 0) to ``b`` (1) on the arc between them, per sample ``b ...``.

    All points are as long as noise is, which those of a straight line are not (Song et al. 2021a,
    appendix D.5).
    """
    one, two = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(one, two)
    theta = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos().reshape(-1, *(1,) * (a.ndim - 1))
    return (((1 - share) * theta).sin() * a + (share * theta).sin() * b) / theta.sin()
