"""What a config says of the maths: the names of schedules, targets and weights, and the one target
that has a number. Saying them needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.level import Level

Schedule = Literal["linear", "scaled_linear", "cosine"]
TargetName = Literal["x0", "eps", "v", "score", "velocity"]
WeightingName: TypeAlias = Literal[
    "uniform", "sigma2", "min_snr", "soft_min_snr", "p2", "elbo", "truncated_snr"
]


@dataclass(frozen=True)
class Edm:
    """The preconditioned target y = (x0 - c_skip x) / c_out, seen from the input c_in x.

    Written for any pair (alpha, sigma): c_skip x is the best linear guess of x0, and input and
    target have variance 1. All of it stays the same if x, alpha and sigma are scaled together.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5
    kind: Literal["edm"] = "edm"

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be greater than 0, not {self.sigma_data}")

    def std(self, level: Level) -> Tensor:
        """Standard deviation of x_t; its inverse is c_in."""
        return ((level.alpha * self.sigma_data) ** 2 + level.sigma**2).sqrt()


Target: TypeAlias = TargetName | Edm
