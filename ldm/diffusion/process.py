"""The forward process: q(x_t | x0) = N(alpha(t) x0, sigma(t)^2 I), variance preserving, on a table
of betas.

    alpha_bar_i = prod_{s <= i} (1 - beta_s),   alpha = sqrt(alpha_bar),   sigma = sqrt(1 -
    alpha_bar)

Ho et al. 2020, eq. 4 (linear); Rombach et al. 2022 (scaled linear); Nichol & Dhariwal 2021, eq. 17
(cosine); Lin et al. 2024, algorithm 1 (zero terminal SNR).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.level import Level
from ldm.diffusion.target import Target, determinant

Schedule = Literal["linear", "scaled_linear", "cosine"]
_IN_DIFFUSERS: dict[Schedule, str] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
_PREDICTION_TYPE: dict[Target, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TARGET_OF_PREDICTION_TYPE: dict[str, Target] = {
    name: target for target, name in _PREDICTION_TYPE.items()
}


@dataclass(frozen=True)
class NoiseProcess:
    """A discrete variance-preserving process; the config *is* the process.

    Time ``t`` runs over [0, 1], data at 0 and noise at 1, and falls into one of
    ``num_train_timesteps`` equal cells; the cell's number is the ``timestep`` that the network's
    embedding sees.

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

    @cached_property
    def table(self) -> Level:
        """All levels, float64 tensors of length ``num_train_timesteps``, from clean to noisy."""
        betas = DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=_IN_DIFFUSERS[self.schedule],
        ).betas.double()
        alpha_bar = (1 - betas).cumprod(0)
        if self.zero_terminal_snr:
            root = alpha_bar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            alpha_bar = root**2
        return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def timestep(self, t: Tensor) -> Tensor:
        """Number of the cell that ``t`` in [0, 1] falls into, int64."""
        cell = (t.double() * self.num_train_timesteps).floor().long()
        return cell.clamp(0, self.num_train_timesteps - 1)

    def at(self, timestep: Tensor) -> Level:
        """Level at integer timesteps, float64, on their device."""
        return Level(*(part[timestep.long()] for part in _table_on(self, timestep.device)))

    def level(self, t: Tensor) -> Level:
        """Level at times ``t`` in [0, 1], float64."""
        return self.at(self.timestep(t))

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
        """Raises ``ValueError`` if ``target`` does not determine x0 at some level of this
        process.
        """
        if bool((determinant(target, self.table) == 0).any()):
            raise ValueError(
                f"target {target!r} says nothing about x0 where alpha = 0, which zero_terminal_snr"
                " makes the last timestep: use target 'v' (or 'x0'), or set"
                " process.zero_terminal_snr to false"
            )

    def scheduler_config(self, target: Target) -> dict[str, Any]:
        """The process and its target in the words of diffusers' ``scheduler_config.json``."""
        if target not in _PREDICTION_TYPE:
            raise ValueError(
                f"diffusers' schedulers cannot express target {target!r}: use one of"
                f" {[*_PREDICTION_TYPE]}"
            )
        return {
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": _IN_DIFFUSERS[self.schedule],
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "prediction_type": _PREDICTION_TYPE[target],
            # Other spacings skip the last timestep, the only one that pure noise belongs to.
            "timestep_spacing": "trailing" if self.zero_terminal_snr else "leading",
        }

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> NoiseProcess:
        """Reads a process back from a ``scheduler_config.json``; ``ValueError`` names a key that
        has no meaning here.
        """
        schedules: dict[str, Schedule] = {name: own for own, name in _IN_DIFFUSERS.items()}
        schedule = config.get("beta_schedule", "linear")
        if schedule not in schedules or config.get("trained_betas") is not None:
            wrong = "trained_betas" if schedule in schedules else f"beta_schedule {schedule!r}"
            raise ValueError(
                f"scheduler config: {wrong} is not supported, only beta_schedule"
                f" {sorted(schedules)}"
            )
        return cls(
            schedule=schedules[schedule],
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )


@lru_cache(maxsize=32)
def _table_on(process: NoiseProcess, device: torch.device) -> Level:
    """The table where it is looked up: a training step must not wait for a device's timesteps."""
    return Level(*(part.to(device) for part in process.table))
