"""What a run will cost, before any of it: memory, disk, arithmetic, time.

One optimiser step is traced over tensors without data (``FakeTensorMode``), as a CPU would compute
it: which tensors live at once, the FLOPs of matrix work, what all else reads and writes, and how
many operations there are.

    memory = parameters + average + moments + peak of a step (gradients, activations, temporaries)
    time   = FLOPs / rate + 3.7 traffic / bandwidth + 5 us operations

rate and bandwidth are those of the device at hand, measured in less than a second.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ldm.config.loader import images
from ldm.config.schema import RunConfig
from ldm.engine import optimizer_state, pieces
from ldm.engine.precision import DTYPES, compute_in, device_at_hand, named
from ldm.engine.task import Task
from ldm.tasks.gpus import Gpu

SLOWER = 3.7
"""How many times longer an operation takes than to read and write what it does."""
OVERHEAD = 5e-6
"""Seconds that an operation, or a view, takes beside: of Python, autograd and torch.

Both, and that matrix work reaches the rates of large products, were fitted to 15 settings on a CPU
with AVX-512 bf16 (tests/benchmarks/README.md), of which the time is told within 0.81 and 1.15 times
what was measured. No GPU has been."""
_PROBE = 0.25  # seconds for each of the three rates


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
        traffic: read and written in a step by all that is not matrix work, as float32: a CPU
            computes in it whatever is stored.
        operations: of torch in a step, views among them.
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
        if made and not func.is_view and not count:  # what makes none, or a view, reads nothing
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.traffic += 4 * sum(x.numel() for x in [*made, *given])
        return out


# -- the device at hand --


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of convolutions and of products, bytes a second, and of which device."""

    convolution: float
    product: float
    bandwidth: float
    device: str


def measure(precision: str) -> Rates:
    """The rates of this machine's GPU, or else its CPU, in the precision of the run."""
    device = device_at_hand()
    compute_in(precision)
    dtype = DTYPES[precision]
    large = device.type == "cuda"
    with torch.no_grad():
        channels, side, n = (320, 64, 16) if large else (128, 16, 16)
        x = torch.ones(n, channels, side, side, dtype=dtype, device=device)
        kernel = torch.ones(channels, channels, 3, 3, dtype=dtype, device=device)
        rounds = _rounds(lambda: nn.functional.conv2d(x, kernel, padding=1), device)
        convolution = rounds * 2 * x.numel() * channels * 9
        width, rows = (4096, 8192) if large else (512, 2048)
        a = torch.ones(rows, width, dtype=dtype, device=device)
        b = torch.ones(width, width, dtype=dtype, device=device)
        product = _rounds(lambda: a @ b, device) * 2 * a.numel() * width
        line = torch.ones(2**27 if large else 2**22, device=device)
        bandwidth = _rounds(lambda: line + 1, device) * 2 * line.nbytes
    return Rates(convolution, product, bandwidth, named(device))


def _rounds(run: Callable[[], Tensor], device: torch.device) -> float:
    """How often a second ``run`` runs."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    wait()
    count, begin = 0, time.perf_counter()
    while True:
        run()
        wait()
        count += 1
        spent = time.perf_counter() - begin
        if spent > _PROBE:
            return count / spent


def seconds(cost: Cost, rates: Rates) -> float:
    """Of one optimiser step on one process of that device."""
    work = cost.convolution / rates.convolution + cost.product / rates.product
    return work + SLOWER * cost.traffic / rates.bandwidth + OVERHEAD * cost.operations


# -- what is printed --


def lines(
    config: RunConfig,
    step: Step,
    cost: Cost,
    split: tuple[int, int],
    data: tuple[int, int, int] | None,
) -> Iterator[tuple[str, str, str]]:
    """Name, value and what it counts, of what a run on this machine costs.

    Args:
        config: the run.
        step: of its program.
        cost: of it.
        split: images per process and per micro-batch.
        data: training pictures, of these entries in a cache, captions; None: not known.
    """
    share, micro = split
    rates = measure(config.precision)
    held = [
        ("frozen", cost.frozen),
        ("learning", cost.learning),
        ("average", cost.average - cost.host),
        ("moments", cost.moments),
        (f"a step of {micro} images at a time", cost.working),
    ]
    told = " + ".join(f"{name} {size(value)}" for name, value in held if value)
    # What the networks of a run are set to compute here; a GPU has a fused kernel for it.
    full = config.precision == "bfloat16" and device_at_hand().type == "cpu"
    note = " (with attention as this CPU computes it; a GPU keeps less)" if full else ""
    yield "memory", size(cost.memory), f"{told}{note}; beside Python's own"
    if cost.host:
        yield "on the host", size(cost.host), "average (ema.device)"
    if cost.unread:
        told = f"{', '.join(step.unread)}: until all that they say is cached, and in validations"
        yield "beside it", size(cost.unread), told
    keep = config.checkpoints.keep
    disk = f"{keep + 1} checkpoints of {size(cost.checkpoint)} while one is written"
    total = (keep + 1) * cost.checkpoint
    if data and any(step.cached):
        cache = data[1] * step.cached[0] + data[2] * step.cached[1]
        total, disk = total + cache, f"{disk}, cache {size(cache)}"
    yield "disk", size(total), f"{disk}; beside the result"
    flops = cost.convolution + cost.product
    yield (
        "arithmetic",
        f"{flops / 1e12:,.3g} TFLOP",
        f"a step of {share} images, {flops / share / 1e9:,.3g} GFLOP an image",
    )
    spent = seconds(cost, rates)
    speed = share / spent
    how = (
        f"on this {rates.device}, roughly: it does {rates.convolution / 1e9:,.0f} GFLOP/s in"
        f" convolutions, {rates.product / 1e9:,.0f} in products, {rates.bandwidth / 1e9:,.0f} GB/s"
    )
    yield "speed", f"{speed:,.3g} images/s", how
    if data:
        run = images(config.duration, config.batch_size, data[0])
        yield "time", duration(run / speed), f"for {run:,} images, without validation and caching"


def most(precision: str, cost: Cost, share: int, gpu: Gpu) -> tuple[str, str, str]:
    """Name, value and what it says of the speed that ``gpu`` cannot exceed."""
    there = gpu.precision(precision)
    rate = gpu.rate(there)
    speed = share * rate / (cost.convolution + cost.product)
    told = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    how = f"did it nothing but matrix work at the {rate / 1e12:,.3g} TFLOP/s of its data sheet"
    return "at most", f"{told} images/s", f"{gpu.name} in {there}, {how}"


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 999.5 else f"{count / 1000:,.3g} TB"


def duration(spent: float) -> str:
    """Seconds in the unit that suits."""
    for unit, worth in (("days", 86400), ("h", 3600), ("min", 60)):
        if spent >= 2 * worth:
            return f"{spent / worth:,.1f} {unit}"
    return f"{spent:.0f} s"
