"""The forward process: q(x_t | x0) = N(alpha(t) x0, sigma(t)^2 I), t in [0, 1], noise at 1.

It is the solution of dx = f(t) x dt + g(t) dB (Kingma et al. 2021, eq. 25 and 26) with

    f = alpha' / alpha,   g^2 = 2 sigma sigma' - 2 f sigma^2.

discrete: Ho et al. 2020, eq. 4 (linear betas); Rombach et al. 2022 (scaled linear); Nichol &
Dhariwal 2021, eq. 17 (cosine); Lin et al. 2024, algorithm 1 (zero terminal SNR). vp, ve: Song et
al. 2021, eq. 29 and 30. cosine: Salimans & Ho 2022. rectified_flow: Liu et al. 2023, eq. 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.level import Level
from ldm.diffusion.names import Schedule, Target
from ldm.diffusion.shift import SizeShift
from ldm.diffusion.target import determinant

IN_DIFFUSERS: dict[Schedule, str] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}


class NoiseProcess(ABC):
    """What every process gives; its config *is* the process.

    ``num_train_timesteps`` (N) nodes t = 1/N, 2/N, ..., 1 are the levels of a table of that length,
    and timestep i is the node (i + 1) / N.
    """

    kind: Any  # a Literal
    num_train_timesteps: int

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """Level at times ``t`` in [0, 1] with its derivatives, float64."""

    @abstractmethod
    def time_at(self, logsnr: Tensor) -> Tensor:
        """The time in [0, 1] at which log(alpha^2 / sigma^2) is ``logsnr``, or comes nearest."""

    def time(self, u: Tensor) -> Tensor:
        """The time that ``u`` in [0, 1] stands for in training and in a sampler's spacing."""
        return u.double()

    def seen_at(self, tokens: int) -> NoiseProcess:
        """The process as pictures of so many tokens of the network see it."""
        return self

    def span(self, low: float, high: float) -> float:
        """How much of t lies between two readings of the clock of ``time``."""
        return high - low

    def grid(self, count: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """``count`` times, float64, evenly from ``start`` to ``stop`` on the clock of ``time``, of
        which 0 is the first node here: not every target says what x0 and eps are where sigma is 0.
        """
        u = torch.linspace(start, stop, count, dtype=torch.float64)
        first = self._first()
        return self.time(first + (1 - first) * u).clamp(min=1 / self.num_train_timesteps)

    def _first(self) -> float:
        """The ``u`` of the first node."""
        return 1 / self.num_train_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        """What the network's embedding sees of ``t``, float64."""
        return t.double() * self.num_train_timesteps - 1

    def at(self, timestep: Tensor) -> Level:
        """Level at the nodes with these numbers, float64, on their device."""
        return self.level((timestep.double() + 1) / self.num_train_timesteps)

    @cached_property
    def table(self) -> Level:
        """The levels at all nodes, float64 tensors of length N, from clean to noisy."""
        return self.at(torch.arange(self.num_train_timesteps))

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g^2) at times ``t``, float64; infinite where alpha is 0."""
        alpha, sigma, d_alpha, d_sigma = self.level(t)
        assert d_alpha is not None and d_sigma is not None
        f = d_alpha / alpha
        return f, 2 * sigma * d_sigma - 2 * f * sigma**2

    def prior_std(self, data_std: float = 1.0) -> float:
        """Standard deviation at t = 1 of data that have mean 0: what sampling starts from."""
        end = self.level(torch.ones(()))
        return math.hypot(float(end.alpha) * data_std, float(end.sigma))

    def perturb(
        self,
        x0: Float[Tensor, " b *shape"],
        eps: Float[Tensor, " b *shape"],
        t: Float[Tensor, "..."],
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, " b *shape"]:
        """x_t = alpha x0 + sigma eps, mixed in float32 (or float64) and only then cast to
        ``dtype``.
        """
        level = self.level(t).like(x0)
        mixed = level.alpha * x0.to(level.alpha.dtype) + level.sigma * eps.to(level.alpha.dtype)
        return mixed.to(dtype or x0.dtype)

    def refuse(self, target: Target) -> None:
        """Raises ``ValueError`` if ``target`` does not determine x0 at some node."""
        if bool((determinant(target, self.table) == 0).any()):
            why, way_out = f"which it is at t = 1 of process {self.kind!r}", "'velocity', 'v'"
            if isinstance(self, DiscreteVP):
                why = "which zero_terminal_snr makes the last timestep"
                way_out = "'v' (or 'x0'), or set process.zero_terminal_snr to false"
            raise ValueError(
                f"target {target!r} says nothing about x0 where alpha = 0, {why}:"
                f" use target {way_out}"
            )


class VariancePreserving(NoiseProcess):
    """alpha^2 + sigma^2 = 1, for which g^2 = -2 f."""

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log alpha, alpha') at ``t``, float64."""

    def level(self, t: Tensor) -> Level:
        log_alpha, d_alpha = self._log_alpha(t.double())
        alpha, sigma = log_alpha.exp(), torch.expm1(2 * log_alpha).abs().sqrt()
        return Level(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.level(t)  # the general formula is 0 times infinity where sigma is 0
        assert level.d_alpha is not None
        f = level.d_alpha / level.alpha
        return f, -2 * f

    def betas(self) -> Tensor:
        """1 - (alpha_i / alpha_{i-1})^2 of the nodes, float64."""
        log_alpha, _ = self._log_alpha(torch.linspace(0, 1, self.num_train_timesteps + 1).double())
        return -torch.expm1(2 * log_alpha.diff())


class Tabulated(VariancePreserving):
    """A variance-preserving process on a table of betas, on whose nodes it is trained.

    alpha_i = prod_{s <= i} sqrt(1 - beta_s). Between nodes log alpha is interpolated linearly
    (alpha itself where it falls to 0).
    """

    zero_terminal_snr: bool

    @abstractmethod
    def _table_betas(self) -> Tensor:
        """The betas before any rescaling, float64."""

    def time(self, u: Tensor) -> Tensor:
        """The node at the upper end of the cell that ``u`` falls into (derivative 1)."""
        count, u = self.num_train_timesteps, u.double()
        return u + ((u.detach() * count).floor().add(1).clamp(1, count) / count - u.detach())

    def _first(self) -> float:
        return 0.0  # whose cell ends there

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        nodes, slopes = _nodes(self, t.device)
        position = t * len(slopes)
        cell = (position.detach() - 1e-9).ceil().long().clamp(1, len(slopes)) - 1
        w, slope = position - cell, slopes[cell]
        to_zero = slope == -math.inf
        slope = torch.where(to_zero, 0.0, slope)
        upper = torch.where(to_zero, nodes[cell], nodes[cell + 1])
        linear = torch.log1p(-torch.where(to_zero, w, 0.0))
        log_alpha = upper + (w - 1) * slope + linear
        rate = torch.where(to_zero, -nodes[cell].exp(), log_alpha.exp() * slope)
        return log_alpha, rate * len(slopes)

    def time_at(self, logsnr: Tensor) -> Tensor:
        nodes, slopes = _nodes(self, logsnr.device)
        log_alpha = torch.nn.functional.logsigmoid(logsnr.double()) / 2
        cell = torch.searchsorted(-nodes, -log_alpha.detach()).clamp(1, len(slopes)) - 1
        slope, beyond = slopes[cell], log_alpha - nodes[cell]
        w = torch.where(slope == -math.inf, -torch.expm1(beyond), beyond / slope)
        return ((cell + w) / len(slopes)).clamp(0, 1)


@lru_cache(maxsize=32)
def _nodes(process: Tabulated, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log alpha at t = 0, 1/N, ..., 1 and its differences, on the device where it is looked up: a
    training step must not wait for a device's times.
    """
    root = (1 - process._table_betas()).cumprod(0).sqrt()  # pyright: ignore[reportPrivateUsage]
    if process.zero_terminal_snr:
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    nodes = torch.cat([root.new_zeros(1), root.log()])
    return nodes.to(device), nodes.diff().to(device)


@dataclass(frozen=True)
class DiscreteVP(Tabulated):
    """The table of a schedule that diffusers knows.

    Args:
        schedule: shape of the betas.
        beta_start: first beta (not used by cosine).
        beta_end: last beta (not used by cosine).
        num_train_timesteps: length of the table.
        zero_terminal_snr: rescale so that alpha is exactly 0 at the last timestep.
    """

    schedule: Schedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    kind: Literal["discrete"] = "discrete"

    def _table_betas(self) -> Tensor:
        return DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=IN_DIFFUSERS[self.schedule],
        ).betas.double()


@dataclass(frozen=True)
class TrainedVP(Tabulated):
    """A table that a model brings along: ``trained_betas`` of its scheduler's config.

    Args:
        trained_betas: the betas, in (0, 1); the last may be 1, where alpha falls to 0.
        zero_terminal_snr: rescale so that alpha is exactly 0 at the last timestep.

    Raises:
        ValueError: a beta is none.
    """

    trained_betas: tuple[float, ...]
    zero_terminal_snr: bool = False
    kind: Literal["trained"] = "trained"

    def __post_init__(self) -> None:
        *before, last = self.trained_betas
        if wrong := [b for b in before if not 0 < b < 1] or ([] if 0 < last <= 1 else [last]):
            raise ValueError(f"trained_betas must lie between 0 and 1, not {wrong[0]}")

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        """Length of the table."""
        return len(self.trained_betas)

    def _table_betas(self) -> Tensor:
        return torch.tensor(self.trained_betas).double()  # float32 first, as schedulers keep them


@dataclass(frozen=True)
class ContinuousVP(VariancePreserving):
    """The Ornstein-Uhlenbeck process dx = -beta(t) x / 2 dt + sqrt(beta(t)) dB, beta linear in t.

    Args:
        beta_min: beta(0).
        beta_max: beta(1).
        num_train_timesteps: nodes, and the range of timesteps.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    num_train_timesteps: int = 1000
    kind: Literal["vp"] = "vp"

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rise = self.beta_max - self.beta_min
        log_alpha = -t * (self.beta_min / 2 + t * rise / 4)
        return log_alpha, -log_alpha.exp() * (self.beta_min + t * rise) / 2

    def time_at(self, logsnr: Tensor) -> Tensor:
        rise, half = self.beta_max - self.beta_min, self.beta_min / 2
        log_alpha = torch.nn.functional.logsigmoid(logsnr.double()) / 2
        log_alpha = log_alpha.clamp(min=-half - rise / 4)
        return -2 * log_alpha / (half + (half**2 - rise * log_alpha).sqrt())


@dataclass(frozen=True)
class Cosine(VariancePreserving):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Args:
        num_train_timesteps: nodes, and the range of timesteps.
    """

    num_train_timesteps: int = 1000
    kind: Literal["cosine"] = "cosine"

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = (1 - t) * (math.pi / 2)  # so that alpha is exactly 0 at t = 1
        return angle.sin().log(), -math.pi / 2 * angle.cos()

    def time_at(self, logsnr: Tensor) -> Tensor:
        return (-logsnr.double() / 2).exp().atan() * (2 / math.pi)


@dataclass(frozen=True)
class VarianceExploding(NoiseProcess):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t: the geometric levels of NCSN (Song &
    Ermon 2019). The network is told c_noise = log(sigma) / 4 (Karras et al. 2022, table 1).

    Args:
        sigma_min: sigma(0).
        sigma_max: sigma(1).
        num_train_timesteps: nodes.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_train_timesteps: int = 1000
    kind: Literal["ve"] = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be less than sigma_max ({self.sigma_max})")

    @property
    def _rise(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def level(self, t: Tensor) -> Level:
        sigma = self.sigma_min * (t.double() * self._rise).exp()
        return Level(torch.ones_like(sigma), sigma, torch.zeros_like(sigma), sigma * self._rise)

    def time_at(self, logsnr: Tensor) -> Tensor:
        return ((-logsnr.double() / 2 - math.log(self.sigma_min)) / self._rise).clamp(0, 1)

    def timestep(self, t: Tensor) -> Tensor:
        return (t.double() * self._rise + math.log(self.sigma_min)) / 4


@dataclass(frozen=True)
class RectifiedFlow(NoiseProcess):
    """alpha = 1 - t, sigma = t. The shift is a change of clock, not of the path: sigma / alpha is
    ``shift`` times as large at the same ``u``, and velocity stays eps - x0 (Esser et al. 2024, eq.
    23).

    Args:
        shift: sqrt of the ratio of the numbers of latent pixels to that at which it is 1; or one
            that goes by the size of a picture, which is that at ``start`` until one is seen.
        num_train_timesteps: nodes, and the range of timesteps.
    """

    shift: float | SizeShift = 1.0
    num_train_timesteps: int = 1000
    kind: Literal["rectified_flow"] = "rectified_flow"

    def level(self, t: Tensor) -> Level:
        t = t.double()
        return Level(1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    def time_at(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr.double() / 2)

    def seen_at(self, tokens: int) -> RectifiedFlow:
        shift = self.shift
        return replace(self, shift=shift.at(tokens)) if isinstance(shift, SizeShift) else self

    @property
    def _shift(self) -> float:
        return self.shift.at(self.shift.start) if isinstance(self.shift, SizeShift) else self.shift

    def time(self, u: Tensor) -> Tensor:
        u, shift = u.double(), self._shift
        return shift * u / (1 + (shift - 1) * u)

    def span(self, low: float, high: float) -> float:
        ends = self.time(torch.tensor([low, high], dtype=torch.float64))
        return float(ends[1] - ends[0])

    def _first(self) -> float:
        node, shift = 1 / self.num_train_timesteps, self._shift
        return node / (shift - (shift - 1) * node)

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * self.num_train_timesteps
