"""Which noise levels are trained on: t = F^{-1}(u), with u stratified over the global batch.

The density of t is p = du / dt, so dt / du is the importance weight that makes the mean over u of
``weight * loss`` that over uniform t. A sampler whose density *is* the weighting does without.

A network that is asked at some levels only, as the refiner of SDXL is (Podell et al. 2023, section
2.5), is trained on t in [low, high]: u goes to F(low) + u (F(high) - F(low)), still one point in
each cell of equal probability. The density there is p / (F(high) - F(low)), and the importance
weight, divided by the length of what is left, makes the mean that over uniform t in [low, high].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # these classes are their own config, which is read before torch is imported
    from torch import Tensor

    from ldm.diffusion.process import NoiseProcess

_MOST = 1_000_000  # cells


@dataclass(frozen=True)
class TimeSampler(ABC):
    """An inverse CDF; ``unbiased``: the loss is multiplied by 1 / p(t).

    Times are those of the clock of the process (``NoiseProcess.time``), which is where samplers
    begin and end too.

    Args:
        low: least time that is trained on; 0 is data.
        high: greatest time that is trained on; 1 is noise.
    """

    low: float = field(default=0.0, kw_only=True)
    high: float = field(default=1.0, kw_only=True)

    if TYPE_CHECKING:  # a field of every kind, with a default of its own
        unbiased: bool

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low must be less than high, both in [0, 1], not {self.low} and {self.high}"
            )

    @abstractmethod
    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        """Float64 ``u`` in (0, 1) to times on the clock of ``process``; differentiable."""

    @abstractmethod
    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        """Float64 times in [0, 1] on the clock of ``process`` to the ``u`` that ``inverse_cdf``
        brings there; where none does, the end that lies there.
        """

    def ends(self, process: NoiseProcess) -> tuple[float, float]:
        """The two ``u``, in order, between which times fall into [low, high].

        Raises:
            ValueError: next to no time does, so that no ``u`` tells the times there apart.
        """
        return _ends(self, process)

    def __call__(self, u: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        """(t, weight), float64, of the shape of ``u`` in [0, 1); the weight is uniform density on
        [low, high] over that of t.
        """
        import torch

        whole = (self.low, self.high) == (0, 1)
        with torch.enable_grad():
            u = u.detach().double().clamp(1e-12, 1 - 1e-12).requires_grad_()
            first, last = (0.0, 1.0) if whole else self.ends(process)
            within = u if whole else first + u * (last - first)
            t = process.time(self.inverse_cdf(within, process))
            (slope,) = torch.autograd.grad(t.sum(), u)
        weight = slope.abs()
        return t.detach(), weight if whole else weight / process.span(self.low, self.high)


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

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        return t


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
        super().__post_init__()
        if not (0 < self.t_min < 1 and 0 < self.cells <= _MOST):
            raise ValueError(f"t_min must lie in (0, 1), and cells in 1..{_MOST}")

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        return _inverse(u, *self._cells(u, process))

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        return _forward(t, *self._cells(t, process))

    def _cells(self, like: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        """Their edges and masses."""
        import torch

        edges = self.t_min ** torch.linspace(1, 0, self.cells + 1).to(like)
        middle = process.time((edges[1:] * edges[:-1]).sqrt())
        return edges, edges.diff() / process.level(middle).sigma ** 2


@dataclass(frozen=True)
class LossSecondMoment(TimeSampler):
    """p(t) proportional to sqrt(E[loss(t)^2]) over the last losses of each cell (Nichol & Dhariwal
    2021, eq. 18); uniform until every cell has its ``history``.

    Args:
        cells: equal cells of [low, high].
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
        super().__post_init__()
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
                cell = int((t - self.low) / (self.high - self.low) * self.cells)
                self.losses[min(cell, self.cells - 1)].append(loss)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        if not self._filled():
            return self.low + (self.high - self.low) * u
        return _inverse(u, *self._cells(u))

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        if not self._filled():
            return ((t - self.low) / (self.high - self.low)).clamp(0, 1)
        return _forward(t, *self._cells(t))

    def ends(self, process: NoiseProcess) -> tuple[float, float]:
        return 0.0, 1.0  # there are no cells elsewhere

    def _filled(self) -> bool:
        return all(len(cell) == self.history for cell in self.losses)

    def _cells(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Their edges and masses."""
        import torch

        kept = [list(cell) for cell in self.losses]
        losses = torch.tensor(kept, dtype=like.dtype, device=like.device)
        root = losses.square().mean(1).sqrt()
        share = root / root.sum() if float(root.sum()) > 0 else torch.ones_like(root) / self.cells
        edges = torch.linspace(self.low, self.high, self.cells + 1).to(like)
        return edges, (1 - self.uniform) * share + self.uniform / self.cells


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
        super().__post_init__()
        _positive("std", self.std)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


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
        super().__post_init__()
        _positive("std", self.std)

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        first, last = self._below(torch.tensor([0.0, 1.0]).to(u), process)
        z = self.mean + self.std * torch.special.ndtri(first + u * (last - first))
        return process.time_at(-2 * z)

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        first, last = self._below(torch.tensor([0.0, 1.0]).to(t), process)
        return (self._below(t, process) - first) / (last - first)

    def _below(self, t: Tensor, process: NoiseProcess) -> Tensor:
        """Share of the normal distribution below the level at ``t``."""
        import torch

        z = -process.level(t).logsnr / 2
        return torch.special.ndtr((z - self.mean) / self.std)


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
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in -1..{2 / (math.pi - 2):.3f}, not {self.scale}")

    def inverse_cdf(self, u: Tensor, process: NoiseProcess) -> Tensor:
        return 1 - u - self.scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)

    def cdf(self, t: Tensor, process: NoiseProcess) -> Tensor:
        import torch

        least, most = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):  # t falls with u; its inverse has no formula
            u = (least + most) / 2
            later = self.inverse_cdf(u, process) > t
            least, most = torch.where(later, u, least), torch.where(later, most, u)
        return (least + most) / 2


@lru_cache(maxsize=32)
def _ends(times: TimeSampler, process: NoiseProcess) -> tuple[float, float]:
    import torch

    low, high = times.low, times.high
    t = torch.tensor([low, high], dtype=torch.float64)
    first, last = sorted(times.cdf(t, process).tolist())
    if not last - first > 1e-9:
        raise ValueError(
            f"{type(times).__name__} draws next to no time between low {low} and high {high}"
            f" (a share of {last - first:.1g}): move them, or use another kind of times"
        )
    return first, last


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


def _forward(t: Tensor, edges: Tensor, mass: Tensor) -> Tensor:
    """CDF of the density whose inverse is ``_inverse``."""
    import torch

    cdf = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])
    t = t.clamp(edges[0], edges[-1])
    cell = (torch.searchsorted(edges, t, right=True) - 1).clamp(0, len(mass) - 1)
    within = (t - edges[cell]) / (edges[cell + 1] - edges[cell])
    return cdf[cell] + within * (cdf[cell + 1] - cdf[cell])
