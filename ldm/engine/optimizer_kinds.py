"""The optimisers that a run can have: torch's, and those of other packages.

The kernel of a convolution, ``o i h w``, is the matrix ``o (i h w)`` to those that tell matrices
from vectors. Each is told by the name of its class, in small letters (``optimizer_state``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ldm.config.optimizer import Optimizer as Settings
from ldm.config.optimizer import require


def build(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of ``groups``, which say ``params``, ``weight_decay`` and ``matrices``: whether
    theirs are weights of layers.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    require(settings)
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    adam = {"betas": settings.betas, "eps": settings.eps}
    if settings.kind == "adafactor":
        return Adafactor(groups, **common)
    if settings.kind == "muon":
        return Muon(groups, common, adam)
    if settings.kind == "lion":
        from lion_pytorch.foreach import Lion

        return Lion(groups, **common, betas=settings.betas)
    if settings.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **common, **adam)
    if settings.kind == "prodigy":
        from prodigyopt import Prodigy

        # Decay stands in the groups: as a default it is announced on stdout.
        return Prodigy(
            groups, lr=settings.lr, **adam, use_bias_correction=True, safeguard_warmup=True
        )
    return torch.optim.AdamW(groups, **common, **adam, fused=_fused(groups))


def _fused(groups: Sequence[Mapping[str, Any]]) -> bool | None:
    """The default is a pass over memory for every operation: 2.5 times as slow on a CPU, many
    kernels to launch on a GPU.
    """
    every = (p for group in groups for p in group["params"])
    return all(p.device.type in ("cpu", "cuda") for p in every) or None


@contextmanager
def _as_matrices(groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Inside, weights of more than two axes, and their gradients, are matrices."""
    every = [p for group in groups for p in group["params"] if p.ndim > 2]
    shapes = [p.shape for p in every]
    for p in every:
        grad, p.grad = p.grad, None
        p.data = p.data.reshape(len(p), -1)
        p.grad = None if grad is None else grad.reshape(len(p), -1)
    try:
        yield
    finally:
        for p, shape in zip(every, shapes, strict=True):
            grad, p.grad = p.grad, None
            p.data = p.data.view(shape)
            p.grad = None if grad is None else grad.view(shape)


class Adafactor(torch.optim.Adafactor):
    """torch's, to which a kernel is a matrix: by its last two axes, 3 and 3, little is saved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        with _as_matrices(self.param_groups):
            return super().step(closure)


class Muon(torch.optim.Optimizer):
    """torch's Muon for the weights of layers and AdamW for the rest, as one optimiser.

    Steps of matrices are as long as AdamW's would be, so that one learning rate serves both (Liu et
    al. 2025, section 2.2).

    Args:
        groups: with ``matrices``.
        common: learning rate and decay of both.
        adam: moments of AdamW.
    """

    def __init__(
        self, groups: list[dict[str, Any]], common: dict[str, Any], adam: dict[str, Any]
    ) -> None:
        super().__init__(groups, {**common, **adam})
        self.matrices = [group for group in self.param_groups if group["matrices"]]
        rest = [group for group in self.param_groups if not group["matrices"]]
        self.parts: list[torch.optim.Optimizer] = []
        if self.matrices:
            with _as_matrices(self.matrices):
                muon = torch.optim.Muon(self.matrices, **common, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if rest:
            self.parts.append(torch.optim.AdamW(rest, **common, **adam, fused=_fused(rest)))
        for part in self.parts:  # one state, and the same groups: whoever sets a rate sets theirs
            part.state = self.state
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.matrices = [group for group in self.param_groups if group["matrices"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        with _as_matrices(self.matrices):
            for part in self.parts:
                part.step()
        return loss
