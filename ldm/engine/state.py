"""The state of a run beside the weights that it shows: raw weights, optimiser, counters.

    training/raw.safetensors   training/optimizer.safetensors   training/run.json

All float32 (AdamW's own step counts included), under the names of the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.engine.checkpoint import CheckpointError

Weights = Mapping[str, Tensor]


def write(
    folder: Path, weights: Weights, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """Writes ``folder``, which must not exist."""
    folder.mkdir()
    raw = {name: value.detach().contiguous() for name, value in weights.items()}
    save_file(raw, folder / "raw.safetensors")
    moments = {
        f"{name}/{kind}": moment.contiguous()
        for name, value in weights.items()
        for kind, moment in optimizer.state[value].items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "run.json").write_text(json.dumps(counters))


@torch.no_grad()
def read(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Sets weights and optimiser to what ``write`` kept and returns the counters.

    Raises:
        CheckpointError: the weights are those of another model.
    """
    raw = load_file(folder / "raw.safetensors")
    check_shapes(raw, weights, folder.parent)
    for name, value in weights.items():
        value.copy_(raw[name])
    moments = load_file(folder / "optimizer.safetensors")
    for name, value in weights.items():
        optimizer.state[value] = {
            # AdamW counts its steps on the CPU.
            kind: moments[f"{name}/{kind}"].to("cpu" if kind == "step" else value.device)
            for kind in ("step", "exp_avg", "exp_avg_sq")
        }
    return json.loads((folder / "run.json").read_text())


def check_shapes(found: Weights, expected: Weights, folder: Path | str) -> None:
    """``CheckpointError`` naming the first tensor of ``folder`` that does not fit the model."""
    for name, value in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder} holds another model: it lacks {name}")
        if found[name].shape != value.shape:
            raise CheckpointError(
                f"{folder} holds another model: {name} is {tuple(found[name].shape)} there and"
                f" {tuple(value.shape)} in this config; use its config or another run folder"
            )
