"""What a run costs on the machine at hand, as a dry run tells it: memory, disk, arithmetic, time.

    time = FLOPs / rate + 2.2 x traffic / elementwise rate + 10 us x operations

The rates, those of large matrix products and of SiLU, are measured in less than a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.config.loader import images
from ldm.config.schema import RunConfig
from ldm.engine.precision import DTYPES, compute_in, device_at_hand, named
from ldm.tasks.estimate import Cost, Step
from ldm.tasks.gpus import Gpu

ELEMENTWISE = 2.2
"""How many times longer than SiLU of as many bytes what is no matrix work takes."""
OVERHEAD = 1e-5
"""Seconds that every operation takes beside, views too: of Python, autograd and torch.

Both were fitted to 15 settings on one thread of a CPU with AVX-512 bf16, of which the time is told
as 0.83 to 1.20 of what was measured, and that of seven others as 0.90 to 1.13
(tests/benchmarks/README.md). Other CPUs, several threads and GPUs were not measured; on a GPU,
where operations overlap, both say too much."""
_PROBE = 0.25  # seconds for each of the three rates


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of convolutions and of products, bytes a second that SiLU of float32 reads and
    writes, and of which device.
    """

    convolution: float
    product: float
    elementwise: float
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
        # Of a CPU's cache: what memory gives is shared with all that runs beside.
        line = torch.ones(2**27 if large else 2**18, device=device)
        elementwise = _rounds(lambda: nn.functional.silu(line), device) * 2 * line.nbytes
    return Rates(convolution, product, elementwise, named(device))


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


def parts(cost: Cost, rates: Rates) -> tuple[float, float, float]:
    """Seconds of one optimiser step on one process of that device: matrix work, the rest of what is
    computed, and calling it.
    """
    work = cost.convolution / rates.convolution + cost.product / rates.product
    return work, ELEMENTWISE * cost.traffic / rates.elementwise, OVERHEAD * cost.operations


def seconds(cost: Cost, rates: Rates) -> float:
    """Of one optimiser step on one process of that device."""
    return sum(parts(cost, rates))


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
    work, rest, calls = parts(cost, rates)
    spent = work + rest + calls
    speed = share / spent
    how = (
        f"on this {rates.device}, roughly: it does {rates.convolution / 1e9:,.0f} GFLOP/s in"
        f" convolutions, {rates.product / 1e9:,.0f} in products,"
        f" {rates.elementwise / 1e9:,.0f} GB/s in SiLU;"
        f" matrix work {work / spent:.0%}, the rest of what is computed {rest / spent:.0%}"
    )
    yield "speed", f"{speed:,.3g} images/s", how
    if data:
        run = images(config.duration, config.batch_size, data[0])
        yield "time", duration(run / speed), f"for {run:,} images, without validation and caching"


def most(precision: str, cost: Cost, share: int, gpu: Gpu) -> tuple[str, str, str]:
    """Name, value and what it says of the speed that ``gpu`` cannot exceed by its data sheet (its
    clock may be some per cent higher).

    Args:
        precision: that the config asks for, ``auto`` among them.
        cost: of one optimiser step.
        share: images of it.
        gpu: one of ``GPUS``.
    """
    there = gpu.precision(precision)
    rate = gpu.rate(there)
    speed = share * rate / (cost.convolution + cost.product)
    told = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    how = f"if it did nothing but matrix work at the {rate / 1e12:,.3g} TFLOP/s of its data sheet"
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
