"""What a run will cost, before any of it: memory, matrix work, what else is read and written.

One optimiser step is traced over tensors without data (``FakeTensorMode``), as a CPU would compute
it: which tensors live at once, the FLOPs of matrix work, what all else reads and writes, and how
many operations there are.

    memory = parameters + average + moments + peak of a step (gradients, activations, temporaries)

How long it takes and how that is told: ``ldm.tasks.costs``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ldm.config.schema import RunConfig
from ldm.engine import optimizer_state, pieces
from ldm.engine.precision import DTYPES
from ldm.engine.task import Task


@dataclass(frozen=True)
class Step:
    """What a program computes.

    Args:
        networks: on the meta device; what learns requires gradients.
        task: what a run of them would train.
        saved: names of the networks that a checkpoint holds; None: what learns alone.
        cached: bytes kept in the cache of each picture and of each caption.
        unread: names of the frozen networks that are not where it computes once all that they say
            is cached.
    """

    networks: Mapping[str, nn.Module]
    task: Task
    saved: tuple[str, ...] | None
    cached: tuple[int, int] = (0, 0)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Of one process. Bytes unless named otherwise.

    Args:
        frozen: parameters that do not learn, and that the step reads.
        unread: those that it does not read and that are gone meanwhile.
        learning: parameters that do.
        average: their moving average; on the host if ``ema.device`` says so.
        host: the part of ``average`` that is there, not where the step computes.
        moments: what the optimiser keeps.
        working: most that lives at once within a step: gradients, what is kept for the backward
            pass, temporaries.
        checkpoint: one on disk.
        convolution: FLOPs of an optimiser step in convolutions.
        product: FLOPs in matrix products and attention.
        traffic: read and written by all of forward and backward that is not matrix work, as
            float32, which a CPU computes in whatever is stored; and by the optimiser, as stored.
        operations: of torch in forward and backward, views among them.
    """

    frozen: int
    unread: int
    learning: int
    average: int
    moments: int
    working: int
    checkpoint: int
    convolution: int
    product: int
    traffic: int
    operations: int = 0
    host: int = 0

    @property
    def memory(self) -> int:
        """All that a process holds at once where it computes."""
        held = self.frozen + self.learning + self.average + self.moments + self.working
        return held - self.host


def _there(step: Step) -> dict[str, nn.Module]:
    """The networks that are where it computes."""
    return {name: network for name, network in step.networks.items() if name not in step.unread}


def held(config: RunConfig, step: Step) -> Cost:
    """What does not depend on the images of a step: all but the work, and what lives within it."""
    there, ema = _there(step), config.ema
    named = {
        f"{part}.{name}": p
        for part, network in there.items()
        for name, p in network.named_parameters()
        if p.requires_grad
    }
    trained, copies = _bytes({*named.values()}), len(ema.half_lives) if ema else 0
    every = {p for network in there.values() for p in network.parameters()}
    moments = optimizer_state.size(config.optimizer.kind, named)
    saved = (
        trained
        if step.saved is None
        else sum(4 * p.numel() for name in step.saved for p in step.networks[name].parameters())
    )
    return Cost(
        frozen=_bytes(every) - trained,
        unread=sum(_bytes(step.networks[name].parameters()) for name in step.unread),
        learning=trained,
        average=trained * copies,
        host=trained * copies if ema and ema.device else 0,
        moments=moments,
        working=0,
        # The raw weights, moments and further averages beside them.
        checkpoint=saved + moments + (1 + max(copies - 1, 0)) * trained,
        convolution=0,
        product=0,
        # The optimiser reads weight, gradient and moments, and writes all but the gradient; an
        # average is read and written.
        traffic=(3 + (2 * copies // ema.every if ema else 0)) * trained + 2 * moments,
    )


def trace(config: RunConfig, step: Step, micro: int, parts: int) -> Cost:
    """The cost of an optimiser step of ``parts`` micro-batches of ``micro`` images.

    ``step.networks`` lose the meta device to the fake one.
    """
    with torch.device("meta"):
        example = step.task.example(micro)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in step.networks.values():
            # to_empty asks of each tensor what it is like: three times as long.
            network._apply(_empty)
        every = {p for network in _there(step).values() for p in network.parameters()}
        learning = {p for p in every if p.requires_grad}
        live = _Live(every)
        with live:
            if parts > 1:
                pieces.sum_in_float32(p for p in learning if p.dtype == torch.bfloat16)
            for parameter in learning:
                if parts > 1:  # all but the first meet the gradients of those before
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
                if config.optimizer.in_backward:
                    parameter.register_post_accumulate_grad_hook(_let_go)
            live.traffic = live.operations = 0  # gradients are there already
            dtype = DTYPES[config.precision]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                batch = {n: torch.empty(x.shape, dtype=x.dtype) for n, x in example.items()}
                loss = step.task(batch)["loss"].mean()
            loss.backward()
        for parameter in learning:
            parameter.grad = None
    convolution = sum(n for op, n in live.flops.items() if "convolution" in str(op))
    rest = held(config, step)
    return replace(
        rest,
        working=max(live.peak, pieces.gradient(config, learning, parts)),
        convolution=parts * convolution,
        product=parts * (live.flops.total() - convolution),
        traffic=rest.traffic + parts * live.traffic,
        operations=parts * live.operations,
    )


def _empty(tensor: Tensor) -> Tensor:
    """A tensor that lies as this one of the meta device does."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _let_go(parameter: Tensor) -> None:
    """The gradient of ``parameter``, which has stepped by it."""
    parameter.grad = None


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# By operation: those that torch counts, and attention on a CPU.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
            *(x.shape for x in (grad, q, k, v))
        )
    ),
}


# What is there, seen otherwise, and what is not yet there.
_MOVES_NOTHING = {
    torch.ops.aten._unsafe_view,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


class _Live(TorchDispatchMode):
    """Bytes of storages that are alive, beside those of ``known``, bytes that went through what is
    no matrix work, operations, and FLOPs by kind. (``FlopCounterMode`` of torch hooks every module,
    and its hooks keep activations that checkpointing would have let go.)
    """

    def __init__(self, known: set[nn.Parameter]) -> None:
        super().__init__()
        self.sizes = {p.untyped_storage()._cdata: 0 for p in known}
        self.now = self.peak = self.traffic = self.operations = 0
        self.flops = Counter[Any]()

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lets ``func`` run and counts what it made."""
        if func is torch.ops.prim.device.default:  # two of three calls; nothing is computed
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        count = _FLOPS.get(func.overloadpacket)
        if count:
            self.flops[func.overloadpacket] += count(*args, **(kwargs or {}), out_val=out)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        if made and not (count or func.is_view or func.overloadpacket in _MOVES_NOTHING):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.traffic += 4 * sum(x.numel() for x in [*made, *given])
        return out
