"""Which noise levels are trained on: t = F^{-1}(u), with u stratified over the global batch.

The density of t is p = du / dt, so dt / du is the importance weight that makes the mean over u of
``weight * loss`` that over uniform t. A sampler whose density *is* the weighting does without.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # these classes are their own config, which is read before torch is imported
    from torch import Tensor

    from ldm.diffusion.process import NoiseProcess

_MOST = 1_000_000  # cells


class TimeSampler(ABC):
    """An inverse CDF; ``unbiased``: the loss is multiplied by 1 / p(t)."""

    unbiased: bool

    @abstractmethod
    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        """Float64 ``u`` in (0, 1) to times on the clock of ``process``; differentiable."""

    def __call__(self, u: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        """(t, 1 / p(t)), float64, of the shape of ``u`` in [0, 1)."""
        import torch

        with torch.enable_grad():
            u = u.detach().double().clamp(1e-12, 1 - 1e-12).requires_grad_()
            t = process.time(self.inverse_cdf(u, process))
            (slope,) = torch.autograd.grad(t.sum(), u)
        return t.detach(), slope.abs()


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Every time alike.

    Args:
        unbiased: multiply the loss by 1 / p(t).
    """

    unbiased: bool = False
    kind: Literal["uniform"] = "uniform"

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        return u


@dataclass(frozen=True)
class InverseVariance(TimeSampler):
    """p(t) proportional to 1 / sigma(t)^2 on [t_min, 1], constant in each of ``cells`` (Song et al.
    2021b sample g^2 / sigma^2 in this way).

    Args:
        t_min: the cut-off: the density of a process with sigma(0) = 0 has no integral without.
        cells: number of cells, even in log t.
        unbiased: multiply the loss by 1 / p(t).
    """

    t_min: float = 1e-5
    cells: int = 1000
    unbiased: bool = True
    kind: Literal["inverse_variance"] = "inverse_variance"

    def __post_init__(self) -> None:
        if not (0 < self.t_min < 1 and 0 < self.cells <= _MOST):
            raise ValueError(f"t_min must lie in (0, 1), and cells in 1..{_MOST}")

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        edges = self.t_min ** torch.linspace(1, 0, self.cells + 1).to(u)
        middle = process.time((edges[1:] * edges[:-1]).sqrt())
        return _inverse(u, edges, edges.diff() / process.level(middle).sigma ** 2)


@dataclass(frozen=True)
class LossSecondMoment(TimeSampler):
    """p(t) proportional to sqrt(E[loss(t)^2]) over the last losses of each cell (Nichol & Dhariwal
    2021, eq. 18); uniform until every cell has its ``history``.

    Args:
        cells: equal cells of [0, 1].
        history: losses that each remembers.
        uniform: share of uniform times mixed in.
        unbiased: multiply the loss by 1 / p(t).
    """

    cells: int = 100
    history: int = 10
    uniform: float = 0.001
    unbiased: bool = True
    kind: Literal["loss_second_moment"] = "loss_second_moment"

    def __post_init__(self) -> None:
        if not (0 < self.cells <= _MOST and 0 < self.history <= _MOST and 0 < self.uniform <= 1):
            raise ValueError(f"cells and history must lie in 1..{_MOST}, and uniform in (0, 1]")

    @cached_property
    def losses(self) -> list[deque[float]]:
        """The last losses by cell: state of a run, and no part of the config."""
        return [deque(maxlen=self.history) for _ in range(self.cells)]

    def update(self, times: Iterable[float], losses: Iterable[float]) -> None:
        """Remembers finite losses at ``times`` as ``inverse_cdf`` gave them, in this order."""
        for t, loss in zip(times, losses, strict=True):
            if math.isfinite(loss):
                self.losses[min(int(t * self.cells), self.cells - 1)].append(loss)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        if any(len(cell) < self.history for cell in self.losses):
            return u
        losses = torch.tensor([list(cell) for cell in self.losses], dtype=u.dtype, device=u.device)
        root = losses.square().mean(1).sqrt()
        share = root / root.sum() if float(root.sum()) > 0 else torch.ones_like(root) / self.cells
        edges = torch.linspace(0, 1, self.cells + 1).to(u)
        return _inverse(u, edges, (1 - self.uniform) * share + self.uniform / self.cells)


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024, eq. 19).

    Args:
        mean: of logit(t).
        std: of logit(t).
        unbiased: multiply the loss by 1 / p(t).
    """

    mean: float = 0.0
    std: float = 1.0
    unbiased: bool = False
    kind: Literal["logit_normal"] = "logit_normal"

    def __post_init__(self) -> None:
        _positive("std", self.std)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class LogNormal(TimeSampler):
    """log(sigma / alpha) ~ N(mean, std^2), as far as the process has these levels (Karras et al.
    2022, table 1).

    Args:
        mean: of log(sigma / alpha).
        std: of log(sigma / alpha).
        unbiased: multiply the loss by 1 / p(t).
    """

    mean: float = -1.2
    std: float = 1.2
    unbiased: bool = False
    kind: Literal["log_normal"] = "log_normal"

    def __post_init__(self) -> None:
        _positive("std", self.std)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        ends = -process.level(torch.tensor([0.0, 1.0]).to(u)).logsnr / 2
        low, high = torch.special.ndtr((ends - self.mean) / self.std)
        z = self.mean + self.std * torch.special.ndtri(low + u * (high - low))
        return process.time_at(-2 * z)


@dataclass(frozen=True)
class Mode(TimeSampler):
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) (Esser et al. 2024, eq. 20).

    Args:
        scale: above 0 towards the middle, below 0 towards both ends.
        unbiased: multiply the loss by 1 / p(t).
    """

    scale: float = 1.29
    unbiased: bool = False
    kind: Literal["mode"] = "mode"

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in -1..{2 / (math.pi - 2):.3f}, not {self.scale}")

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        return 1 - u - self.scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, not {value}")


def _inverse(u: Tensor, edges: Tensor, mass: Tensor) -> Tensor:
    """Inverse CDF of a density that is constant between ``edges`` and has ``mass`` there."""
    import torch

    cdf = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])
    cell = (torch.searchsorted(cdf, u.detach(), right=True) - 1).clamp(0, len(mass) - 1)
    within = (u - cdf[cell]) / (cdf[cell + 1] - cdf[cell])
    return edges[cell] + within * (edges[cell + 1] - edges[cell])
