"""What a task learns from its losses beside the weights, and keeps in its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.diffusion import NoiseProcess
from ldm.diffusion.times import LossSecondMoment


class Memory:
    """Nothing but the weights learns."""

    def update(self, accelerator: Accelerator) -> None:
        """After every step, in all processes: takes over what the step has seen."""

    def state(self) -> Any:
        """What a checkpoint keeps, as JSON."""

    def load(self, state: Any) -> None:
        """Sets what ``state`` gave."""


class LossMemory(Memory):
    """The losses of ``LossSecondMoment``, from the whole global batch in its order: the same in all
    processes, for any number of them, at any micro-batch size.

    Args:
        times: whose losses these are.
        process: on whose clock.
    """

    def __init__(self, times: LossSecondMoment, process: NoiseProcess) -> None:
        self.times, self.process = times, process
        self.pending: list[Tensor] = []

    def add(self, position: Tensor, u: Tensor, loss: Tensor) -> None:
        """A micro-batch of this process: losses without importance weights, each ``b``."""
        t = self.times.inverse_cdf(u.double(), self.process)
        self.pending.append(torch.stack([position.double(), t, loss.detach().double()], 1))

    def update(self, accelerator: Accelerator) -> None:
        """Takes over what was added; waits for the device."""
        rows = accelerator.gather(torch.cat(self.pending))
        self.pending = []
        _, t, loss = rows[rows[:, 0].argsort()].T.tolist()
        self.times.update(t, loss)

    def state(self) -> list[list[float]]:
        """The losses by cell."""
        return [list(cell) for cell in self.times.losses]

    def load(self, state: Any) -> None:
        """Sets the losses by cell; none where those of the checkpoint were others."""
        known = state if state and len(state) == self.times.cells else [[]] * self.times.cells
        for cell, losses in zip(self.times.losses, known, strict=True):
            cell.clear()
            cell.extend(losses)
