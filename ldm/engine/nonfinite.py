"""Steps whose loss or gradient is not a number: whose images they were, and what is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


@dataclass
class Step:
    """One optimiser step as one process saw it. Nothing of it is read from the device before it is
    asked for.

    Args:
        seen: images of the run before it.
    """

    seen: int
    positions: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    norm: Tensor | float = 0.0

    def add(self, batch: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        """A micro-batch as the loader gave it, on the host, and what the task made of it."""
        # Lists: a tensor of a reading process would keep its file descriptor open.
        self.positions += batch["position"].tolist()
        if "u" in batch:
            self.times += batch["u"].tolist()
        # A copy: CUDA graphs write the next step's loss into the same memory.
        self.losses.append(terms["loss"].detach().clone())
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach().double().sum()

    def finite(self) -> bool:
        """Whether this process's loss and the gradient norm are numbers; waits for the device."""
        return math.isfinite(self.norm) and math.isfinite(self.sums["loss"])


def evidence(
    step: Step, batch: int, key: Callable[[int], str], accelerator: Accelerator
) -> dict[str, Any]:
    """All that is known of ``step``, over all processes, ready for JSON; a collective.

    Args:
        step: this process's share of it.
        batch: images per step.
        key: of the example at a position.
        accelerator: the processes.
    """
    from accelerate.utils import gather_object

    losses = [value for loss in step.losses for value in loss.reshape(-1).tolist()]
    times = step.times or [None] * len(losses)
    share = [
        {"position": position, "key": key(position), "u": time, "loss": loss}
        for position, time, loss in zip(step.positions, times, losses, strict=True)
    ]
    samples = sorted(gather_object(share), key=lambda sample: sample["position"])
    loss = sum(sample["loss"] for sample in samples) / len(samples)
    for sample in samples:
        sample["loss"] = _number(sample["loss"])
    return {
        "step": step.seen // batch + 1,
        "images": [step.seen, step.seen + batch - 1],
        "loss": _number(loss),
        "gradient_norm": _number(float(step.norm)),
        "samples": samples,
    }


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


def worst(found: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The samples whose loss is not finite, then those with the largest, at most ``count``."""

    def rank(sample: dict[str, Any]) -> tuple[bool, float]:
        loss = float(sample["loss"])
        return math.isfinite(loss), -loss if math.isfinite(loss) else 0.0

    return sorted(found["samples"], key=rank)[:count]


def told(found: dict[str, Any]) -> str:
    """``evidence`` in one line."""
    named = "; ".join(
        f"position {sample['position']} {json.dumps(sample['key'], ensure_ascii=False)}"
        + ("" if sample["u"] is None else f" at u = {sample['u']:.4f}")
        + f" has loss {_short(sample['loss'])}"
        for sample in worst(found, 3)
    )
    first, last = found["images"]
    return (
        f"the loss of step {found['step']} (images {first} to {last}) is {_short(found['loss'])}"
        f" and its gradient norm {_short(found['gradient_norm'])}; worst of its"
        f" {len(found['samples'])} images: {named}"
    )


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
