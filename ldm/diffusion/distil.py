"""Losses whose target a teacher makes: few steps, or one evaluation a step, in place of many.

guidance      y_student(x_t, w) -> y_teacher, guided at w     Meng et al. 2023, section 3.1
progressive   one step t -> s of the student ends where two DDIM steps t -> (t + s) / 2 -> s of the
              teacher do: x0 -> (x_s - r x_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t
                                                              Salimans & Ho 2022, algorithm 2
consistency   f(x_t, t) -> f(x_s, s) without a gradient, x_s one step of the teacher from x_t,
              f = c_skip x_t + c_out x0_hat                   Song et al. 2023, eq. 5 and 7; in
                                                              latent space Luo et al. 2023, alg. 1
reflow        the loss of a rectified flow on (noise, what the teacher makes of it)
                                                              Liu et al. 2023, algorithm 1

What a sample is guided at is told to the teacher, and to a student that can hear it, by its
condition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.condition import Condition, Denoiser, Predictor, predictor
from ldm.diffusion.level import Level, broadcast
from ldm.diffusion.objective import LossTerms, Objective
from ldm.diffusion.process import NoiseProcess, VariancePreserving
from ldm.diffusion.target import Prediction, coefficients

Solver: TypeAlias = Literal["ddim", "heun"]
_SIGMA_DATA, _SCALING = 0.5, 10.0  # as diffusers' LCMScheduler has them


def nodes(process: NoiseProcess, steps: int) -> Tensor:
    """The ``steps + 1`` times from 0 to 1 between which a sampler of so many steps goes, float64:
    even on the clock of the process, and of a variance preserving one at the nodes of its table
    that "trailing" spacing means.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    if isinstance(process, VariancePreserving):
        return (u * process.num_train_timesteps).round() / process.num_train_timesteps
    return process.time(u)


def ask(
    process: NoiseProcess, predict: Predictor, x: Tensor, t: Tensor, cond: Condition
) -> Prediction:
    """What ``predict`` says of ``x`` at times ``t``, ``b``."""
    return predict(x, process.level(t), process.timestep(t), cond)


def step(
    process: NoiseProcess,
    predict: Predictor,
    x: Float[Tensor, " b *shape"],
    t: Float[Tensor, " b"],
    s: Float[Tensor, " b"],
    cond: Condition,
    solver: Solver = "ddim",
) -> Float[Tensor, " b *shape"]:
    """``x`` at times ``t`` brought to times ``s`` along the probability-flow ODE of ``predict``.

    ddim: Song et al. 2021a, eq. 12 with sigma = 0. heun: the trapezoidal rule on the level
    (``ldm.sampling.ode``).
    """
    after = process.level(s).like(x)
    found = ask(process, predict, x, t, cond)
    there = after.alpha * found.x0 + after.sigma * found.eps
    if solver == "ddim":
        return there
    level = process.level(t).like(x)
    d_alpha, d_sigma = after.alpha - level.alpha, after.sigma - level.sigma
    first = d_alpha * found.x0 + d_sigma * found.eps
    found = ask(process, predict, x + first, s, cond)
    return x + (first + d_alpha * found.x0 + d_sigma * found.eps) / 2


def one_step(x_t: Tensor, x_s: Tensor, level: Level, after: Level) -> Tensor:
    """The x0 whose one DDIM step from ``x_t`` at ``level`` ends in ``x_s`` at ``after``, levels
    broadcast over ``x_t`` (Salimans & Ho 2022, appendix G).
    """
    ratio = after.sigma / level.sigma
    return (x_s - ratio * x_t) / (after.alpha - ratio * level.alpha)


def boundary(process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at times ``t``, float64: (1, 0) at the first node, where the way has ended,
    and next to (0, 1) elsewhere (Luo et al. 2023, section 4.1, as diffusers' ``LCMScheduler``
    scales it).
    """
    number = _SCALING * (t.double() * process.num_train_timesteps - 1)
    total = number**2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / total, number / total.sqrt()


def end(process: NoiseProcess, predict: Predictor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """f(x, t): where the way through ``x`` at times ``t`` ends, ``b ...``."""
    c_skip, c_out = (broadcast(part, x) for part in boundary(process, t))
    x0 = ask(process, predict, x, t, cond).x0
    return c_skip * x + c_out * x0.to(c_out.dtype)


@dataclass(frozen=True)
class Distillation(Objective):
    """An objective whose target a teacher makes.

    Args:
        teacher: guided as it is to be; frozen, on the same noise, whatever it speaks.
    """

    teacher: Predictor = field(kw_only=True)

    def _fitted(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        y: Tensor,
        importance: Tensor | None = None,
    ) -> LossTerms:
        """The weighted squared distance of what the student says from ``y``, in its own space."""
        level = process.level(t)
        found = predictor(denoiser, self.target)(x_t, level, process.timestep(t), cond)
        mse = (found.y.to(y.dtype) - y).square().flatten(1).mean(1)
        return self._terms(process, mse, t, level, importance)


@dataclass(frozen=True)
class GuidanceDistillation(Distillation):
    """One evaluation of the student for the two of a guided teacher."""

    def __call__(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        z: Float[Tensor, " b *shape"],
        cond: Condition,
        *,
        u: Float[Tensor, " b"],
        eps: Float[Tensor, " b *shape"],
    ) -> LossTerms:
        """Loss per sample."""
        t, importance = self.times(u, process)
        x_t = process.perturb(z, eps, t)
        with torch.no_grad():
            y = ask(process, self.teacher, x_t, t, cond).as_(self.target).to(x_t.dtype)
        return self._fitted(process, denoiser, x_t, t, cond, y, importance)


@dataclass(frozen=True)
class ProgressiveDistillation(Distillation):
    """One step of the student for two of the teacher; ``times`` is not used.

    Args:
        steps: of the student, from noise to data.
    """

    steps: int = field(kw_only=True)

    def __call__(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        z: Float[Tensor, " b *shape"],
        cond: Condition,
        *,
        u: Float[Tensor, " b"],
        eps: Float[Tensor, " b *shape"],
    ) -> LossTerms:
        """Loss per sample."""
        twice = nodes(process, 2 * self.steps).to(z.device)
        first = 2 * (u * self.steps).long().clamp(0, self.steps - 1)
        s, middle, t = twice[first], twice[first + 1], twice[first + 2]
        x_t = process.perturb(z, eps, t)
        level, after = process.level(t).like(z), process.level(s).like(z)
        with torch.no_grad():
            x_m = step(process, self.teacher, x_t, t, middle, cond)
            x_s = step(process, self.teacher, x_m, middle, s, cond)
            x0 = one_step(x_t, x_s, level, after)
            a, b = coefficients(self.target, level)
            y = a * x0 + b * (x_t - level.alpha * x0) / level.sigma
        return self._fitted(process, denoiser, x_t, t, cond, y)


@dataclass(frozen=True)
class ConsistencyDistillation(Distillation):
    """One end for all points of a way; ``times`` and ``weighting`` are not used.

    Args:
        steps: of the grid, between whose neighbours the teacher goes.
        solver: of its step; ``pair``: no teacher is asked, both points are z with the same eps
            (Song et al. 2023, algorithm 3).
        huber: c of sqrt(d^2 + c^2) - c, the mean over all axes; None: d^2.
        average: the student's average, which says the end from the nearer point; None: the
            student does.
    """

    steps: int = field(kw_only=True)
    solver: Solver | Literal["pair"] = field(default="ddim", kw_only=True)
    huber: float | None = field(default=0.001, kw_only=True)
    average: Denoiser | None = field(default=None, kw_only=True)

    def __call__(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        z: Float[Tensor, " b *shape"],
        cond: Condition,
        *,
        u: Float[Tensor, " b"],
        eps: Float[Tensor, " b *shape"],
    ) -> LossTerms:
        """Loss per sample."""
        times = nodes(process, self.steps).clamp(min=1 / process.num_train_timesteps).to(z.device)
        cell = (u * self.steps).long().clamp(0, self.steps - 1)
        s, t = times[cell], times[cell + 1]
        x_t = process.perturb(z, eps, t)
        with torch.no_grad():
            if self.solver == "pair":
                x_s = process.perturb(z, eps, s)
            else:
                x_s = step(process, self.teacher, x_t, t, s, cond, self.solver)
        far = end(process, predictor(denoiser, self.target), x_t, t, cond)
        # After the student: autocast keeps the weights that it cast first, gradients or none.
        with torch.no_grad():
            nearer = predictor(self.average or denoiser, self.target)
            near = end(process, nearer, x_s, s, cond)
        squares = (far - near).square()
        mse = squares.flatten(1).mean(1)
        loss = mse
        if self.huber is not None:
            loss = ((squares + self.huber**2).sqrt() - self.huber).flatten(1).mean(1)
        return LossTerms(loss, mse, t, process.level(t), loss)


@dataclass(frozen=True)
class Reflow(Distillation):
    """The flow from noise to what the teacher makes of that noise.

    Args:
        steps: of the teacher.
        solver: of each.
    """

    steps: int = field(kw_only=True)
    solver: Solver = field(default="ddim", kw_only=True)

    def __call__(
        self,
        process: NoiseProcess,
        denoiser: Denoiser,
        z: Float[Tensor, " b *shape"],
        cond: Condition,
        *,
        u: Float[Tensor, " b"],
        eps: Float[Tensor, " b *shape"],
    ) -> LossTerms:
        """Loss per sample; of ``z`` the shape alone counts."""
        times, x = nodes(process, self.steps).to(z.device), eps
        with torch.no_grad():
            for k in range(self.steps, 0, -1):
                t, s = (times[at].expand(len(x)) for at in (k, k - 1))
                x = step(process, self.teacher, x, t, s, cond, self.solver)
        return super().__call__(process, denoiser, x, cond, u=u, eps=eps)
