"""What an optimiser keeps of each parameter, by name, and giving it back.

    adamw      exp_avg, exp_avg_sq of its shape, step
    adamw8bit  the same in 8 bits, a scale for each block of 256; below 4,096 numbers in float32
    adafactor  row_var, col_var of a matrix; variance of a vector; step
    muon       momentum_buffer of a matrix; of the rest as adamw
    lion       exp_avg
    prodigy    as adamw, and s and p0, by which it finds its learning rate

Each is told by the name of its class, in small letters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.engine.counters import check_moments, check_shapes
from ldm.engine.pieces import InPieces
from ldm.engine.shards import like

log = logging.getLogger(__name__)

_BLOCK, _LEAST = 256, 4096  # of bitsandbytes
_FOUND = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")  # what prodigy has found so far
_NO_MATRICES = ("lora_magnitude_vector", "token_embedding.rows")


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """``optimizer.kind`` of its config."""
    inner = optimizer.inner if isinstance(optimizer, InPieces) else optimizer
    return type(inner).__name__.lower()


def kept(kind: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    """What an optimiser of ``kind`` keeps of ``weight`` after a step: tensors without values. A
    number of Python's, which it is to be given as such, is an integer without axes.

    Args:
        kind: see above.
        name: of the parameter.
        weight: it.
    """
    shape, numbers = weight.shape, weight.numel()
    flat = (shape[0], math.prod(shape[1:])) if weight.ndim > 1 else None

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    integer = empty(dtype=torch.int64)
    adam = {"exp_avg": empty(*shape), "exp_avg_sq": empty(*shape)}
    if kind == "adafactor":
        if flat is None:
            return {"variance": empty(*shape), "step": empty()}
        return {"row_var": empty(flat[0], 1), "col_var": empty(1, flat[1]), "step": empty()}
    if kind == "muon" and flat is not None and is_matrix(name, weight):
        return {"momentum_buffer": empty(*flat)}
    if kind == "lion":
        return {"exp_avg": empty(*shape)}
    if kind == "prodigy":
        return {**adam, "s": empty(numbers), "p0": empty(numbers), "step": integer}
    if kind == "adamw8bit":
        if numbers < _LEAST:
            return {"state1": empty(*shape), "state2": empty(*shape), "step": integer}
        found = {"step": integer}
        for n in "12":
            found[f"state{n}"] = empty(*shape, dtype=torch.uint8)
            found[f"absmax{n}"] = empty(-(-numbers // _BLOCK))
            found[f"qmap{n}"] = empty(256)
        return found
    return {**adam, "step": empty()}


def size(kind: str, weights: Mapping[str, Tensor]) -> int:
    """Bytes that an optimiser of ``kind`` keeps of ``weights``, by name, but for counts of steps
    and tables that all share.
    """
    total = 0
    for name, weight in weights.items():
        for key, value in kept(kind, name, weight).items():
            if key != "step" and not key.startswith("qmap"):
                total += value.numel() * value.element_size()
    return total


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether a parameter is the weight of a layer: no vector (norms, biases, DoRA's magnitudes),
    and no embedding of a new word.
    """
    return weight.ndim > 1 and not any(kind in name for kind in _NO_MATRICES)


def found_so_far(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What it keeps of all parameters together, as JSON; the same in every group."""
    group = optimizer.param_groups[0]
    if kind_of(optimizer) != "prodigy":
        return {}
    return {key: float(group[key]) for key in _FOUND if key in group}


def told(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint says of it beside what it keeps of each parameter."""
    return {"kind": kind_of(optimizer), "found": found_so_far(optimizer)}


def give_back(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    counters: Mapping[str, Any],
    file: Path,
) -> None:
    """Sets what an optimiser kept of ``weights``; nothing, and a warning, if it was of another
    kind.

    Args:
        optimizer: without state.
        weights: its parameters by name.
        moments: what was kept, as ``NAME/KEY``.
        counters: what else the checkpoint says.
        file: of the moments.

    Raises:
        CheckpointError: something is missing, or of another shape.
    """
    kind = kind_of(optimizer)
    before = counters.get("optimizer", {"kind": "adamw", "found": {}})
    if before["kind"] != kind:
        log.warning("the optimiser begins anew: it was %s and is now %s", before["kind"], kind)
        return
    expected = {name: kept(kind, name, weight) for name, weight in weights.items()}
    counted = {name for name, keys in expected.items() if "step" in keys}
    check_moments(moments, weights, counted, counters, file)
    group = {p: group for group in optimizer.param_groups for p in group["params"]}
    met = {key.rpartition("/")[0] for key in moments}
    for name, weight in weights.items():
        if name not in met:
            continue  # it has no state before its first step
        keys = expected[name]
        if kind == "prodigy" and f"{name}/p0" in moments and moments[f"{name}/p0"].ndim == 0:
            keys["p0"] = moments[f"{name}/p0"]  # one number of a weight that began at 0
        shapes = {f"{name}/{key}": value for key, value in keys.items() if key != "step"}
        check_shapes(moments, shapes, file)
        # A count stays on the CPU unless the kernel reads it.
        there = group[weight].get("fused") or group[weight].get("capturable")
        state = optimizer.state[weight]
        for key, value in keys.items():
            tensor = moments[f"{name}/{key}"]
            if value.dtype == torch.int64:
                state[key] = int(tensor)
            elif key == "step":
                state[key] = tensor.to(weight.device) if there else tensor
            else:
                state[key] = like(tensor, weight)
    for one in optimizer.param_groups:
        one.update(before["found"])
