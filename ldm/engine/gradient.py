"""The gradient of a global batch, of which every process computes a share, in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.config.schema import RunConfig
from ldm.diffusion import stream
from ldm.engine import shards
from ldm.engine.graphs import graphs_of
from ldm.engine.nonfinite import Step
from ldm.engine.pieces import InPieces
from ldm.engine.sampler_state import Memory
from ldm.engine.scaling import LossScale


class Gradient:
    """Computes gradients, and clips them.

    Args:
        config: the run.
        accelerator: the processes and the precision.
        model: makes losses of a micro-batch.
        weights: what learns, by name.
        optimizer: of ``weights``.
        scale: of losses.
        memory: what is learnt from a step beside the weights.
        parts: micro-batches of this process's share.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scale: LossScale,
        memory: Memory,
        *,
        parts: int,
    ) -> None:
        self.accelerator, self.model, self.weights = accelerator, model, weights
        self.optimizer, self.scale = optimizer, scale
        self.seed, self.largest, self.parts = config.seed, config.optimizer.clip_norm, parts
        self.share = config.batch_size // accelerator.num_processes
        self.graphs = graphs_of(config, accelerator, memory, self._pass, weights)

    def __call__(self, micro_batches: Iterator[Any], seen: int) -> Step:
        """The step that begins at image ``seen``; the gradient is that of the global batch.

        Args:
            micro_batches: each on the host and where it is computed, in order.
            seen: images of the run before it.
        """
        step, accelerator = Step(seen), self.accelerator
        for part in range(self.parts):
            drawn, batch = next(micro_batches)
            # For dropout, whether a module or a function: what the images meet depends on the first
            # one's number.
            first = int(drawn["position"][0])
            seed = int(stream(self.seed, "network", first).integers(2**63))
            last = part == self.parts - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                terms = self._passes(batch, seed)
            step.add(drawn, terms)
        self.scale.unscale()
        step.norm = shards.whole(self._clipped().detach())
        return step

    def clear(self) -> None:
        """Lets go of the gradient, once the step is taken."""
        if self.graphs is None or not self.graphs.clear():
            self.optimizer.zero_grad()

    def _passes(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """``_pass``, recorded or as it is, with a generator that begins at ``seed``."""

        def begin() -> None:
            torch.manual_seed(seed)

        if self.graphs is not None:
            return self.graphs(batch, begin)
        begin()
        return self._pass(batch)

    def _pass(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward: what the model says of ``batch``, whose gradient is added."""
        with self.accelerator.autocast():
            terms = self.model(batch)
        # DDP averages over ranks: a share's mean becomes the global batch's.
        self.accelerator.backward(terms["loss"].sum() / self.share)
        return {name: term.detach() for name, term in terms.items()}

    def _clipped(self) -> Tensor:
        """The norm of the gradient, which is clipped."""
        if isinstance(self.optimizer, InPieces):
            return self.optimizer.clip(self.largest)
        if self.largest is None:
            grads = [p.grad for p in self.weights.values() if p.grad is not None]
            return torch.nn.utils.get_total_norm(grads)
        return torch.nn.utils.clip_grad_norm_(self.weights.values(), self.largest)
