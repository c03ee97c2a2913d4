"""Steps that draw noise: ancestral ones, the reverse SDE, and Langevin's.

ancestral   x_s ~ q(x_s | x_t, x0_hat)                        Ho et al. 2020, eq. 6 and 7
ddim        x_s = alpha_s x0_hat + sqrt(sigma_s^2 - w^2) eps_hat + w z,
            w^2 = eta^2 beta_tilde                            Song et al. 2021a, eq. 12 and 16
sde         x_s = x_t - (f x_t - g^2 score) dt + g sqrt(dt) z Song et al. 2021b, eq. 6
langevin    x <- x + a / 2 score + sqrt(a) z                  Song & Ermon 2019, algorithm 1
consistency x_s = alpha_s x0_hat + sigma_s z                  Song et al. 2023, algorithm 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.diffusion.variance import Posterior
from ldm.sampling.process_sampler import ProcessSampler, Run


@dataclass(frozen=True)
class Ddim(ProcessSampler):
    """DDIM between any two levels.

    With eta = 0 it is Euler's method for d(x / alpha) = eps_hat d(sigma / alpha), and runs both
    ways; with eta = 1 a step is the ancestral one, the exact posterior of x_s given x_t and x0_hat.

    Args:
        eta: share of the posterior's noise, in [0, 1].
        variance: of the noise at eta = 1; ``beta_tilde`` is that of x0 known, ``beta`` that of x0
            from N(0, 1). Where the network has learnt one it is used instead.
    """

    eta: float = 0.0
    variance: Literal["beta", "beta_tilde"] = "beta_tilde"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the module."""
        if t == s:  # steps that outnumber the nodes of a table
            return x
        if self.eta == 0:
            (x0, eps), (alpha, sigma) = run.ends(x, t), run.factors(x, s)
            return (alpha * x0 + sigma * eps).to(x.dtype)
        found, before = run.at(x, t), run.level(s)
        x0, eps = found.ends
        posterior = Posterior.between(run.level(t), before)
        kept = (before.sigma**2 - self.eta**2 * posterior.beta_tilde).clamp(min=0).sqrt()
        variance = self.variance if found.variance is None else found.variance
        log_variance = posterior.log_variance(variance, x, posterior.beta_tilde)
        noise = self.eta * (log_variance / 2).exp() * run.noise(x)
        return (float(before.alpha) * x0 + float(kept) * eps + noise).to(x.dtype)


@dataclass(frozen=True)
class Consistency(ProcessSampler):
    """The end of the way, and noise anew: for students that tell the end from anywhere. The times
    are 1, 1 - 1/n, ..., 1/n, those that a grid of a multiple of n steps was distilled at.
    """

    stochastic: ClassVar[bool] = True

    def times(self, steps: int, start: float, stop: float | None) -> Tensor:
        """From ``start`` to ``stop``, or to one step above data."""
        count = steps + 1
        u = torch.linspace(start, stop or 0.0, count, dtype=torch.float64)
        return self.process.time(u if stop is not None else u[:-1])

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the module."""
        before = run.level(s)
        x0, noise = run.at(x, t).x0, run.noise(x)
        return (float(before.alpha) * x0 + float(before.sigma) * noise).to(x.dtype)


@dataclass(frozen=True)
class ReverseSde(ProcessSampler):
    """The Euler-Maruyama method, with f and g at the noisier end of a step.

    Raises:
        ValueError: f is infinite at t = 1, where alpha is 0.
    """

    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if float(self.process.table.alpha[-1]) == 0:
            raise ValueError(
                f"the reverse SDE of process {self.process.kind!r} is infinite at t = 1, where"
                " alpha = 0: use sampler 'ancestral', which takes its steps exactly"
            )

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the module."""
        (f, g2), sigma = self.process.sde(t), float(run.level(t).sigma)
        variance = float(g2 * (t - s))
        drift = (1 - float(f * (t - s))) * x - variance / sigma * run.at(x, t).eps
        return (drift + variance**0.5 * run.noise(x)).to(x.dtype)


@dataclass(frozen=True)
class Langevin(ProcessSampler):
    """Annealed Langevin dynamics, and with a predictor the predictor-corrector method (Song et al.
    2021b, algorithm 1): every level is come to by the predictor, or without any by leaving x as it
    is, and then corrected. Without a predictor so is the first one.

    Where alpha changes x cannot stay as it is: all corrections at falling noise cannot make up for
    it (on rectified flow errors fall as steps^(-1/3)), so annealing alone needs alpha = 1.

    A correction moves x by a score of size r times its noise, a = (2 r sigma)^2 (algorithms 4 and
    5). The norms there are those expected, sqrt(d) of noise and sqrt(d) / sigma of the score: norms
    of the sample, or of the batch, would make the step a function of the noise it scales. The
    choice of Song & Ermon 2019, a / sigma^2 = 0.2, is r = 0.22.

    Args:
        predictor: None: annealed Langevin dynamics.
        corrections: at every level.
        r: signal-to-noise ratio of a correction; its stationary variance is too large, by at most
            the share r^2 / (1 - r^2).

    Raises:
        ValueError: no predictor, and alpha changes.
    """

    predictor: ProcessSampler | None = None
    corrections: int = 1
    r: float = 0.16

    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor is None and bool((self.process.table.alpha != 1).any()):
            raise ValueError(
                "annealed Langevin dynamics leaves x as it is from level to level, but process"
                f" {self.process.kind!r} scales it: use sampler 'pc', or process 've'"
            )

    def step(self, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See the class."""
        if self.predictor is not None:
            x = self.predictor.step(run, x, t, s)
        return self._corrected(run, x, s)

    def walk(self, run: Run, x: Tensor, times: Tensor) -> Tensor:
        """``x`` at the first time brought to the last."""
        if self.predictor is None:
            x = self._corrected(run, x, times[0])
        return super().walk(run, x, times)

    def _corrected(self, run: Run, x: Tensor, s: Tensor) -> Tensor:
        sigma = float(run.level(s).sigma)
        for _ in range(self.corrections):
            eps, noise = run.at(x, s).eps, run.noise(x)
            x = (x - 2 * self.r**2 * sigma * eps + 2 * self.r * sigma * noise).to(x.dtype)
        return x
