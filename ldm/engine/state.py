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

from ldm.data.collection import Collection
from ldm.engine.checkpoint import CheckpointError
from ldm.engine.config import plain
from ldm.engine.schema import RunConfig

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


# What may change between a checkpoint and going on from it: where things lie, how often something
# is looked at, how the work is split, and the end (which moves the learning rate towards it).
_FREE = {
    "run", "duration", "micro_batch_size", "log_every", "validation", "checkpoints", "resume",
    "workers", "cache_latents", "cache_text", "attention", "score",
}  # fmt: skip


def identity(config: RunConfig, collection: Collection) -> dict[str, str]:
    """What a run is a function of, by key: every setting that matters, and the data."""
    flat = {"pictures and captions": collection.summary()}
    for key, value in plain(config).items():
        if key not in _FREE:
            parts = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}.{name}".rstrip("."): json.dumps(part) for name, part in parts}
    flat.pop("data.path", None)  # a folder may move
    return flat


def check_identity(folder: Path, expected: dict[str, str]) -> None:
    """``CheckpointError`` naming the first setting that is not what the checkpoint was trained
    with.
    """
    found = json.loads((folder / "run.json").read_text())["identity"]
    for key in sorted(found.keys() | expected.keys()):
        # A run from before a key was there is one in which it is null.
        was, now = found.get(key, "null"), expected.get(key, "null")
        if was != now:
            told = "changed" if " " in key else f"was {was} and is now {now}"
            raise CheckpointError(
                f"{folder.parent.parent.parent} holds a run of another config, {key} {told}: choose"
                " another run folder, or go back"
            )


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
