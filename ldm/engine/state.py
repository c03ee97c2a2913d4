"""The state of a run beside the weights that it shows: raw weights, optimiser, counters.

    training/raw.safetensors   training/optimizer.safetensors   training/run.json
    training/average-HALF_LIFE.safetensors of every average that is not the model

All float32 (step counts included), under the names of the parameters; but weights that are held in
bfloat16, what an optimiser keeps in 8 bits, and the numbers that it keeps as Python's, as integers.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.config.fields import may_change
from ldm.config.loader import images, plain
from ldm.config.schema import RunConfig
from ldm.data.collection import Collection
from ldm.engine import counters as recorded
from ldm.engine.counters import check_shapes
from ldm.engine.optimizer import learning_rate
from ldm.engine.optimizer_state import give_back
from ldm.engine.shards import like, whole
from ldm.errors import CheckpointError, ConfigError
from ldm.storage import checkpoint
from ldm.storage.tensors import write_tensors

Weights = Mapping[str, Tensor]
_RAW, _MOMENTS, _AVERAGE = "raw.safetensors", "optimizer.safetensors", "average-{}.safetensors"


def collect(
    weights: Weights,
    raw: Weights,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[int, Weights] | None = None,
    *,
    here: bool = True,
    copies: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """What ``write`` keeps, by file; a collective where weights are in shards, and the result is
    empty where it is not to be ``here``.

    Args:
        weights: the parameters, which ``optimizer`` knows.
        raw: their values, where something else stands in front of them.
        optimizer: after any number of steps.
        averages: by half-life, those that do not stand in front.
        here: whether this process writes.
        copies: whether all is copied to the host, so that the run may go on before it is written.
    """
    averages = averages or {}
    found: dict[str, dict[str, Tensor]] = {_RAW: {}, _MOMENTS: {}}
    found |= {_AVERAGE.format(half_life): {} for half_life in averages}
    met = set[int]()  # safetensors refuses memory that two names have
    for name, parameter in weights.items():
        every = {(_RAW, name): raw[name].detach()}
        every |= {(_AVERAGE.format(h), name): mean[name] for h, mean in averages.items()}
        for kind, moment in optimizer.state[parameter].items():
            every[_MOMENTS, f"{name}/{kind}"] = torch.as_tensor(moment)
        for (file, key), value in every.items():
            gathered = whole(value)
            if here:  # what was gathered for the file does not stay on the device
                kept = gathered.cpu() if gathered is not value or copies else gathered
                # Raw weights behind an average are a copy already.
                live = copies and not (file == _RAW and raw[name] is not parameter)
                if kept is value and (live or value.data_ptr() in met):
                    kept = kept.clone()
                met.add(kept.data_ptr())
                found[file][key] = kept.contiguous()
    return found


def write(folder: Path, found: Mapping[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
    """Writes what ``collect`` found into ``folder``, which must not exist."""
    folder.mkdir()
    for name, tensors in found.items():
        write_tensors(tensors, folder / name)
    met = {key.rpartition("/")[0] for key in found[_MOMENTS]}
    without = [name for name in found[_RAW] if name not in met]
    recorded.write(folder, counters, without)


@torch.no_grad()
def read(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Sets weights and optimiser to what ``write`` kept and returns the counters.

    Raises:
        CheckpointError: the weights are those of another model.
    """
    raw = _tensors(folder / _RAW)
    check_shapes(raw, weights, folder.parent)
    for name, value in weights.items():
        value.copy_(like(raw[name], value))
    counters = recorded.read(folder)
    give_back(optimizer, weights, _tensors(folder / _MOMENTS), counters, folder / _MOMENTS)
    return counters


def averages(folder: Path, half_lives: Iterable[int], weights: Weights) -> dict[int, Weights]:
    """Those that ``write`` kept, of ``half_lives`` and for ``weights``."""
    files = {half_life: folder / _AVERAGE.format(half_life) for half_life in half_lives}
    found = {half_life: _tensors(file) for half_life, file in files.items() if file.exists()}
    for half_life, mean in found.items():
        check_shapes(mean, weights, files[half_life])
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(f"{file} cannot be read: {line}") from None


def begun(run: Path) -> dict[str, str]:
    """``precision`` and ``attention`` that the run in this folder was begun with, as far as its
    newest checkpoint that can be read tells: it need not be whole.
    """
    try:
        folders = checkpoint.folders(run / "checkpoints")
    except (OSError, ValueError):
        return {}  # no name of a folder: told where it would be made
    for folder in reversed(folders):
        try:
            kept = recorded.read(folder / "training")
            precision = json.loads(kept["identity"]["precision"])
        except (CheckpointError, ValueError, LookupError, TypeError):
            continue  # which of them can be gone on from is found out later
        told = {"precision": precision, "attention": kept.get("attention")}
        return {key: value for key, value in told.items() if isinstance(value, str)}
    return {}


_PATH, _KIND = (re.compile(rf"data(\.\d+)?\.{name}") for name in ("(?:path|hints)", "kind"))
_CONTENT = "data.content"  # stands beside the settings of ``data``: what was found there
_CHANGED = (
    {_CONTENT: "the pictures or captions"}
    | dict.fromkeys(
        [
            "model.unet",
            "model.transformer",
            "model.prior",
            "model.image_encoder",
            "image_encoder.folder",
            "model.text",
            "model.vae",
            "vae.folder",
            "text.folder",
            "distil.teacher",
        ],
        "the weights (or config) that the folder holds",
    )
    | {"lora.file": "the LoRA that it holds"}
)
# The end may move as long as the learning rate has not begun to fall towards it.
_DURATION = "duration"
_TARGETS, _ATTENTION = "lora.targets", json.dumps(["to_q", "to_k", "to_v", "to_out.0"])
_FALLS = (
    " images, towards the end of which the learning rate falls already; with optimizer.cooldown it"
    " is constant before, and a checkpoint of that time goes on to any end"
)


class OtherRunError(CheckpointError):
    """The run folder holds a run of another config: a line that says so, and one per key."""

    several = True


def identity(
    config: RunConfig, collection: Collection, origin: Mapping[str, Any]
) -> dict[str, str]:
    """What a run is a function of, by key: every setting that matters, the data, and the weights
    that were read from folders.

    Args:
        config: the run.
        collection: its pictures and captions.
        origin: what folders held, ``model.unet`` and the like: fingerprints, or settings.
    """
    free = may_change(type(config))
    flat = {_CONTENT: json.dumps(collection.summary())}
    for key, value in plain(config).items():
        if key not in free:
            flat |= _flat(key, value)
    flat[_DURATION] = json.dumps(images(config.duration, config.batch_size, collection.epoch))
    if config.ema and config.validation and len(config.ema.half_lives) > 1:
        # A validation that chooses the model is part of the run.
        for key in ("every", "images", "levels", "seed"):
            flat[f"ema.chosen_by.{key}"] = json.dumps(getattr(config.validation, key))
    # A folder may move: what counts is what was in it.
    named = {key.partition(".")[0] for key in origin}
    flat = {key: v for key, v in flat.items() if key not in named and not _PATH.fullmatch(key)}
    for key, value in origin.items():
        flat |= _flat(key, value)
    return flat


def same_everywhere(
    root: Path, seen: int, identity: Mapping[str, str], accelerator: Accelerator
) -> None:
    """A collective that tells whether all processes begin the same run at the same image.

    Raises:
        CheckpointError: they find different checkpoints in ``root``.
        ConfigError: their data differs.
    """
    mine = torch.tensor([[seen, number(identity)]]).to(accelerator.device)
    found, runs = accelerator.gather(mine).unbind(1)
    if len(found.unique()) > 1:
        raise CheckpointError(
            f"the processes find different checkpoints in {root} (after {found.tolist()} images):"
            " the run folder must be shared by all machines"
        )
    if len(runs.unique()) > 1:
        raise ConfigError("data: all machines need the same pictures, and these differ")


def number(identity: Mapping[str, str]) -> int:
    """A number of 63 bits that two different identities hardly share."""
    text = json.dumps(dict(identity), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _flat(key: str, value: Any) -> dict[str, str]:
    """``{"a": 1, "b": {"c": 2}}`` under ``key.a`` and ``key.b.c``; a list of such under
    ``key.0.a``, ...
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: json.dumps(value)}
    parts = (_flat(f"{key}.{name}", part) for name, part in value.items())
    return {name: text for part in parts for name, text in part.items()}


def _told_before(folder: Path, config: RunConfig, expected: Mapping[str, str]) -> dict[str, str]:
    """The identity in ``folder`` as a run of today would have written it."""
    kept = recorded.read(folder)["identity"]
    if (summary := kept.pop("pictures and captions", None)) is not None:
        kept[_CONTENT] = json.dumps(summary)  # what checkpoints called it before it could change
    found: dict[str, str] = {}
    free = may_change(type(config))
    for key, text in kept.items():
        if key.partition(".")[0] not in free:
            # Once, only the first level had keys of its own.
            found |= _flat(key, recorded.told(folder, key, text))
    # Once, a folder was known by its path, and what was in it is not known any more.
    for key in ("model", "vae", "text"):
        inside = {name: text for name, text in expected.items() if _within(name, key)}
        if found.get(key, "null") != "null" and key not in expected and inside:
            del found[key]
            found |= {name: text for name, text in inside.items() if name not in found}
    # Once, all lines of a text file were one caption; where captions are the same it is no matter.
    for key, text in list(found.items()):
        if _KIND.fullmatch(key) and text == '"folder"':
            lines, same = f"{key.removesuffix('kind')}lines", found.get(_CONTENT)
            joined = same != expected.get(_CONTENT)
            found.setdefault(lines, '"joined"' if joined else expected.get(lines, '"joined"'))
    # Once, a LoRA's default targets were written out.
    if found.get(_TARGETS) == _ATTENTION and expected.get(_TARGETS) == "null":
        found[_TARGETS] = "null"
    defaults = _defaults(config, "", found)
    # What a run from before a key was there did is what the key does by default.
    return {name: text for name, text in defaults.items() if name in expected} | found


def _defaults(config: Any, prefix: str, found: Mapping[str, str]) -> dict[str, str]:
    """Defaults of those fields of ``config``, and of the parts in it, that ``found`` lacks."""
    absent: dict[str, str] = {}
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if key in found:
            continue  # null, or a number: what lies below is not there
        if not any(_within(name, key) for name in found):
            if field.default is not dataclasses.MISSING:
                usual = field.default
                if usual is None and prefix:  # a part may fill in what is left out
                    usual = getattr(dataclasses.replace(config, **{field.name: None}), field.name)
                absent |= _flat(key, plain(usual))
            elif field.default_factory is not dataclasses.MISSING:
                absent |= _flat(key, plain(field.default_factory()))
        elif dataclasses.is_dataclass(value):
            absent |= _defaults(value, f"{key}.", found)
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                if dataclasses.is_dataclass(part):
                    absent |= _defaults(part, f"{key}.{number}.", found)
    return absent


def changes(
    folder: Path,
    config: RunConfig,
    expected: Mapping[str, str],
    allowed: Sequence[str],
    epoch: int | None = None,
) -> list[dict[str, Any]]:
    """How the run that goes on from ``folder`` differs from before: ``key``, ``was``, ``now``.

    Args:
        folder: ``training`` of a checkpoint.
        config: the run that is to go on.
        expected: its ``identity``.
        allowed: keys that may change, with all below them (``optimizer`` for ``optimizer.lr``).
        epoch: images of one epoch.

    Raises:
        OtherRunError: naming every key that changed but is not allowed to.
        ConfigError: ``allowed`` names what is no key.
    """
    found = _told_before(folder, config, expected)
    found.setdefault(_DURATION, expected[_DURATION])  # not kept once
    every = sorted(found.keys() | expected.keys())
    for name in allowed:
        if name.partition(".")[0] in may_change(type(config)):
            continue  # it may change anyway
        if not any(_within(key, name) for key in every):
            near = difflib.get_close_matches(name, every, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(every)}"
            raise ConfigError(f"resume.allow: {name!r} is no key that a run is held to; {hint}")
    # To be null and not to be there is the same.
    differing = [key for key in every if found.get(key, "null") != expected.get(key, "null")]
    if _DURATION in differing:
        ends = [json.loads(kept[_DURATION]) for kept in (found, expected)]
        if not _falls(config, epoch, recorded.read(folder)["images"], ends):
            differing.remove(_DURATION)
    refused = [key for key in differing if not any(_within(key, name) for name in allowed)]
    if refused:
        number = "1 key differs" if len(refused) == 1 else f"{len(refused)} keys differ"
        lines = [
            f"  {key}: {_CHANGED[key]} changed"
            if key in _CHANGED and key in found and key in expected
            else f"  {key} was {_told(found, key)} and is now {_told(expected, key)}"
            + (_FALLS if key == _DURATION else "")
            for key in refused
        ]
        raise OtherRunError(
            "\n".join(
                [
                    f"{folder.parent.parent.parent} holds a run of another config, {number}: choose"
                    " another run folder, go back, or name in resume.allow what may change",
                    *lines,
                ]
            )
        )
    return [
        {"key": key, "was": _value(found, key), "now": _value(expected, key)} for key in differing
    ]


def _falls(config: RunConfig, epoch: int | None, seen: int, ends: Sequence[int]) -> bool:
    """Whether the last of ``seen`` images had another learning rate if the run ended elsewhere."""
    lengths = config.optimizer.warmup, config.optimizer.cooldown
    warmup, cooldown = (each and images(each, config.batch_size, epoch) for each in lengths)
    last = seen - config.batch_size
    rates = {learning_rate(config.optimizer, last, warmup, end, cooldown) for end in ends}
    return seen > 0 and len(rates) > 1


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _told(identity: Mapping[str, str], key: str) -> str:
    return identity.get(key, "not there")


def _value(identity: Mapping[str, str], key: str) -> Any:
    return json.loads(identity[key]) if key in identity else None
