"""What a run would need of a device's memory with other settings, each traced as ``estimate``
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, get_args

from ldm.config.learning import Lora
from ldm.config.schema import RunConfig, TrainConfig
from ldm.engine.batch import split_batch
from ldm.engine.memory import light_kinds, of_kind
from ldm.models.quantised import Bits, installed
from ldm.tasks.costs import size
from ldm.tasks.estimate import Cost, Step, held, trace

C = TypeVar("C", bound=RunConfig)


def cost_of(config: RunConfig, made: Step) -> Cost:
    """Of a step on one process."""
    share, micro = split_batch(config, 1)
    return trace(config, made, micro, share // micro)


def choices(config: C) -> Iterator[tuple[str, Callable[[C], C], bool]]:
    """Settings that take less memory, in the order in which they cost: each as it is written, what
    makes it of a config, and whether a step computes otherwise with it.
    """

    def but(**changes: Any) -> Callable[[C], C]:
        return lambda config: replace(config, **changes)

    def of(kind: str) -> Callable[[C], C]:
        return lambda config: replace(config, optimizer=of_kind(config.optimizer, kind))

    if isinstance(config, TrainConfig) and config.gradient_checkpointing is not True:
        yield "gradient_checkpointing=true", but(gradient_checkpointing=True), True
    if split_batch(config, 1)[1] > 1 and not config.optimizer.in_backward:
        yield "micro_batch_size=1", but(micro_batch_size=1), True
    if config.ema is not None and config.ema.device is None:
        ema = replace(config.ema, device="cpu", every=10)
        yield "ema.device=cpu ema.every=10", but(ema=ema), False
    if isinstance(config, TrainConfig) and config.adds and config.precision == "bfloat16":
        dtypes = ["float32", "bfloat16"]
        if config.lora and config.lora.dora is False and installed():  # None: as its file says
            dtypes += get_args(Bits)
        for dtype in dtypes[dtypes.index(config.frozen) + 1 :] if config.frozen in dtypes else ():
            yield f"frozen={dtype}", but(frozen=dtype), True
    if config.optimizer.kind not in ("adamw8bit", "adafactor"):
        for kind in light_kinds(config):
            yield f"optimizer.kind={kind}", of(kind), False
    if isinstance(config, TrainConfig) and not config.adds and config.distil is None:
        halved = " weights=float32" * (config.weights == "bfloat16")
        yield f"lora.rank=8{halved}", but(lora=Lora(rank=8), weights="float32"), True
    whole = isinstance(config, TrainConfig) and not config.lora and not config.textual_inversion
    whole = whole and config.distil is None and config.weights == "float32"
    if whole and config.precision == "bfloat16":
        # With the lightest optimiser that can step them; in place of a LoRA.
        halves = {"weights": "bfloat16", "ema": None, "lora": None}
        yield (
            "weights=bfloat16 ema=null optimizer.kind=adafactor",
            lambda config: replace(of("adafactor")(config), **halves),
            True,
        )


def lines(
    config: C, made: Step, step: Callable[[C], Step], cost: Cost, limit: int | None
) -> Iterator[tuple[str, str, str]]:
    """Name, value and what it says of the memory of each choice alone, and of those that would fit
    together.

    Args:
        config: the run.
        made: what a step of it computes.
        step: makes that of a config.
        cost: of the run as it is.
        limit: bytes of the device; None: only what needs no tracing is told.
    """
    for text, change, traced in choices(config):
        if limit is not None or not traced:
            yield "with", size(_changed(change(config), made, step, cost, traced)[1].memory), text
    if limit is None:
        return
    if cost.memory <= limit:
        yield "it fits", size(cost.memory), f"of {size(limit)}"
        return
    told = dict[str, str]()
    for text, change, traced in choices(config):
        step_then, then = _changed(change(config), made, step, cost, traced)
        if then.memory < cost.memory:
            config, made, cost = change(config), step_then, then
            set_by = [part.partition("=")[0] for part in text.split()]
            for key in [k for k in told for other in set_by if f"{k}.".startswith(f"{other}.")]:
                told.pop(key, None)  # of two optimisers the second
            told[set_by[0]] = text
        if cost.memory <= limit:
            yield "would fit", size(cost.memory), f"of {size(limit)}: {' '.join(told.values())}"
            return
    yield "does not fit", size(cost.memory), f"of {size(limit)}, with {' '.join(told.values())}"


def _changed(
    config: C, made: Step, step: Callable[[C], Step], cost: Cost, traced: bool
) -> tuple[Step, Cost]:
    """What a step of ``config`` computes, and its cost, where ``made`` and ``cost`` are those of
    one that computes the same unless it has to be ``traced``.
    """
    if not traced:
        return made, with_state(cost, config, made)
    made = step(config)
    return made, cost_of(config, made)


def with_state(cost: Cost, config: RunConfig, step: Step) -> Cost:
    """``cost`` where ``config`` keeps other moments and averages, and computes the same."""
    other = held(config, step)
    return replace(cost, average=other.average, host=other.host, moments=other.moments)
