"""The means that a line of the metrics shows: over the steps since the last one."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from ldm.engine.nonfinite import Step


class Window:
    """Sums over the steps since the last line, and the norm of the last gradient among them.

    Args:
        batch: images per step.
        accelerator: the processes.
    """

    def __init__(self, batch: int, accelerator: Accelerator) -> None:
        self.batch, self.accelerator = batch, accelerator
        self.sums: dict[str, float] = {}  # over all processes, by name, their ``images``, ``norm``
        self.pending: list[Step] = []  # of this process, not yet in the sums

    def gather(self) -> Step | None:
        """Moves pending steps into the sums: one collective for many steps, and no host sync in
        between. Step by step, so that the sums do not depend on when they are taken.

        Returns:
            The first step whose loss or gradient norm is not finite, on every process the same; the
            sums end before it.
        """
        steps, self.pending = self.pending, []
        if not steps:
            return None
        names = list(steps[0].sums)
        rows = torch.stack([torch.stack([*step.sums.values()]) for step in steps])
        # The norm is that of the averaged gradient, of which every process has the same copy.
        norms = torch.stack([step.norm for step in steps]).to(rows)
        rows = torch.cat([self.accelerator.reduce(rows, "sum"), norms[:, None]], 1).tolist()
        for step, (*row, norm) in zip(steps, rows, strict=True):
            sums = dict(zip(names, row, strict=True))
            if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
                return step
            for name, value in (*sums.items(), ("images", self.batch)):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.sums["norm"] = norm
        return None

    def means(self) -> dict[str, float]:
        """Means per image, and ``gradient_norm``; the window is empty after it. Empty where every
        step was skipped.
        """
        sums, self.sums = self.sums, {}
        count, norm = sums.pop("images", 0), sums.pop("norm", None)
        # A window from before a checkpoint kept it lacks the norm.
        last = {} if norm is None else {"gradient_norm": norm}
        return {name: total / count for name, total in sums.items()} | last
