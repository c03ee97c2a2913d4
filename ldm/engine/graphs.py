"""Forward and backward passes that are recorded once for each shape of batches, and replayed: CUDA
graphs.

    batches 1 to 3 of a shape    computed as they are
    batch 4                      recorded: what it reads and writes are buffers that stay
    every one after it           copied into the buffers; one launch, where there were thousands

The host launches the kernels of a small network slower than a GPU runs them; a replay takes no time
of the host. What is recorded is what is computed: draws come with the batch, and dropout's seed is
set before every replay. Gradients are added to tensors that stay, whatever the shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.config.schema import RunConfig, TrainConfig
from ldm.engine.sampler_state import Memory
from ldm.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
Terms = dict[str, Tensor]
Signature = tuple[tuple[str, torch.Size, torch.dtype], ...]
WARM = 3
"""Batches of a shape that are computed before one is recorded: libraries choose their kernels."""


class Recorder(Protocol):
    """What records work of a device."""

    def warm(self, work: Callable[[], T]) -> T:
        """Does ``work`` where it will be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What ``work`` makes, without values, and what does it all anew, with what its inputs hold
        by then.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own, which share their memory: one is replayed at
    a time, and what it made is read before the next.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], T]) -> T:
        """See ``Recorder``."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            made = work()
        here.wait_stream(self.stream)
        return made

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See ``Recorder``."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which pin memory and write checkpoints, may go on meanwhile.
        how = {"stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **how):
            made = work()
        return made, graph.replay


def recorder_of(device: torch.device) -> Recorder:
    """That of ``device``; ``ConfigError`` where it is no GPU."""
    if device.type != "cuda":
        raise ConfigError("cuda_graphs: there is no CUDA GPU here: leave it out")
    return CudaRecorder(device)


class _Recorded(NamedTuple):
    inputs: Terms
    outputs: Terms
    replay: Callable[[], None]


class Graphs:
    """Forward and backward of batches, recorded for each of their shapes.

    Args:
        work: computes a batch and adds its gradient.
        weights: what has the gradients, by name.
        recorder: of the device.
    """

    def __init__(
        self, work: Callable[[Terms], Terms], weights: Mapping[str, Tensor], recorder: Recorder
    ) -> None:
        self.work, self.weights, self.recorder = work, weights, recorder
        self.recorded: dict[Signature, _Recorded] = {}
        self._met: dict[Signature, int] = {}
        # Weights that get a gradient, and of which kind.
        self._reached = dict[Tensor, torch.dtype]()
        self._fails = False

    def __call__(self, batch: Terms, begin: Callable[[], None]) -> Terms:
        """What ``work`` makes of ``batch``, until the next call; the gradient is added.

        Args:
            batch: on the device.
            begin: lets the device's generator begin anew.
        """
        key = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        known, met = self.recorded.get(key), self._met.get(key, 0)
        if known is None and met >= WARM and not self._fails:
            known = self._record(key, batch)
        begin()
        if known is not None:
            for name, x in known.inputs.items():
                x.copy_(batch[name], non_blocking=True)
            known.replay()
            return known.outputs
        if self._fails:
            return self.work(batch)
        self._met[key] = met + 1
        made = self.recorder.warm(lambda: self.work(batch))
        found = ((p, p.grad) for p in self.weights.values())
        self._reached = {p: grad.dtype for p, grad in found if grad is not None}
        return made

    def clear(self) -> bool:
        """Lets gradients be 0 where they lie, if they have to stay there; whether they have to."""
        if self.recorded:
            torch._foreach_zero_([p.grad for p in self._reached])
        return bool(self.recorded)

    def _record(self, key: Signature, batch: Terms) -> _Recorded | None:
        """Records ``work`` on batches such as ``batch``; None, and a line, where that cannot be."""
        for p, dtype in self._reached.items():
            if p.grad is None:  # the memory that all graphs add to
                p.grad = torch.zeros_like(p, dtype=dtype)
        inputs = {name: x.clone() for name, x in batch.items()}
        try:
            outputs, replay = self.recorder.record(lambda: self.work(inputs))
        except RuntimeError as error:
            told = " ".join(str(error).split(". ")[0].split())[:200]
            log.warning(
                "cuda_graphs: a step cannot be recorded, and the run does without: %s", told
            )
            self._fails = True
            return None
        self.recorded[key] = _Recorded(inputs, outputs, replay)
        return self.recorded[key]


def graphs_of(
    config: RunConfig,
    accelerator: Accelerator,
    memory: Memory,
    work: Callable[[Terms], Terms],
    weights: Mapping[str, Tensor],
) -> Graphs | None:
    """What records ``work``, if ``config.cuda_graphs`` asks for it.

    Args:
        config: the run.
        accelerator: the processes, and the device.
        memory: what is learnt from a step beside the weights.
        work: computes a batch and adds its gradient.
        weights: what has the gradients, by name.

    Raises:
        ConfigError: it asks for what that excludes.
    """
    if not isinstance(config, TrainConfig) or not config.cuda_graphs:
        return None
    excluded = {
        "several processes": accelerator.num_processes > 1,
        "optimizer.in_backward": config.optimizer.in_backward,
        "precision float16": config.precision == "float16",
        "distil, whose teachers come and go": config.distil is not None,
        "objective.times that learn from losses": type(memory) is not Memory,
    }
    for what, there in excluded.items():
        if there:
            raise ConfigError(f"cuda_graphs: not with {what}: leave it out")
    return Graphs(work, weights, recorder_of(accelerator.device))
