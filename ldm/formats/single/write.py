"""A pipeline folder as one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.formats import integrity
from ldm.formats.recognised import INDEX
from ldm.formats.single import header, original_config, text
from ldm.formats.single.families import KINDS, OWN, Configs, Kind, kind_of, placed
from ldm.formats.single.place import to_file
from ldm.formats.single.readers import refused
from ldm.storage.disk import atomic_write, write_text
from ldm.storage.tensors import write_tensors

ANY = "none"
"""In place of a kind: whatever its shape, whoever can open it."""
CHOICES = ("auto", *(kind.name for kind in KINDS), ANY)

_V, _ZERO = "v_pred", "ztsnr"
_GUESSED = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_ABOVE = 0.09
"""What ComfyUI tells the prediction of a Stable Diffusion 2 by: the deviation of this tensor."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        file: it.
        kind: of it.
        notes: what its reader has to know, one sentence each.
    """

    file: Path
    kind: Kind
    notes: tuple[str, ...]


def write(
    folder: Path,
    file: Path,
    *,
    kind: str = "auto",
    half: bool = False,
    raw: Mapping[str, Tensor] | None = None,
) -> Written:
    """Writes the pipeline in ``folder`` as one safetensors file, in the dtypes that it has there.

    Args:
        folder: in diffusers' layout.
        file: what to write; a YAML beside it where A1111 needs one.
        kind: one of ``CHOICES``.
        half: floating point as float16.
        raw: tensors in place of those of the folder, by part and name.

    Raises:
        OSError: a file of the folder is missing.
        ValueError: the folder is damaged, or the readers of such files cannot open what it holds;
            the message is one line.
    """
    parts = [part for part in integrity.check(folder, {}, False) if part not in header.LEFT_OUT]
    index = integrity.json_object(folder / INDEX)
    configs: dict[str, Mapping[str, Any]] = {
        part: integrity.json_object(folder / part / "config.json") for part in parts
    }
    configs["scheduler"] = integrity.json_object(folder / "scheduler" / "scheduler_config.json")
    found = kind_of({part: index[part][1] for part in parts}, configs)
    if kind not in ("auto", ANY, found.name):
        raise ValueError(f"{folder} is no {kind}: its file would be of the kind {found.name}")
    if kind != ANY and (wrong := refused(found, configs, _vocabularies(folder, index))):
        raise ValueError(f"{folder}: {wrong}; --family none writes it all the same, for ldm import")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        mine = _replaced(_weights(folder / part, index[part][1]), raw or {}, part)
        tensors |= to_file(mine, placed(found, part, configs[part]))
    foreign = sorted(key for key in tensors if key.startswith(OWN))
    if kind != ANY and foreign:
        raise ValueError(
            f"{folder}: {found.readers} know no tensor {foreign[0].removeprefix(OWN)}, and"
            f" {len(foreign)} like it; --family none writes them all the same, for ldm import"
        )
    tensors |= _marks(found, configs)
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    files = header.files_of(folder)
    told = header.of(found, file.stem, configs, files)
    with atomic_write(file) as partial:
        write_tensors(tensors, partial, told)
        header.put_hash(partial)
    notes = _notes(found, configs, tensors) if kind != ANY else []
    if kind != ANY and found.name in ("sd1", "sd2") and _needs_config(found, configs):
        beside = file.with_suffix(".yaml")
        write_text(beside, original_config.text(found, configs))
        notes.insert(0, f"A1111 reads what is beside it, {beside.name}: keep the two together")
    left = [name for name in header.LEFT_OUT if integrity.is_part(index.get(name))]
    notes += [f"{name} is in no single file and was left out" for name in left]
    return Written(file, found, tuple(notes))


def _weights(folder: Path, cls: str) -> dict[str, Tensor]:
    """Tensors of a network's folder, by the names that they have in folders of today."""
    files = integrity.weights(folder) or []
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    if cls.startswith("CLIP"):
        return {text.in_files(n): v for n, v in tensors.items() if text.in_files(n) != text.IDS}
    if cls.startswith("T5") and text.TIED[1] in tensors:
        tensors.pop(text.TIED[0], None)
    return tensors


def _replaced(
    tensors: dict[str, Tensor], raw: Mapping[str, Tensor], part: str
) -> dict[str, Tensor]:
    """``tensors`` with those of ``raw`` that are of ``part``."""
    for key, value in raw.items():
        if key.startswith(f"{part}."):
            name = key.removeprefix(f"{part}.")
            name = name if name in tensors else text.in_files(name)
            if name not in tensors or tensors[name].shape != value.shape:
                raise ValueError(f"raw weights {key} are of no tensor of the folder")
            tensors[name] = value.to(tensors[name].dtype)
    return tensors


def _vocabularies(folder: Path, index: Mapping[str, Any]) -> list[dict[str, int]]:
    """Of the CLIP tokenizers."""
    found = []
    for name in ("tokenizer", "tokenizer_2"):
        entry = index.get(name)
        if integrity.is_part(entry) and entry[1].startswith("CLIP"):
            file = folder / name / "vocab.json"
            if file.is_file():
                found.append(integrity.json_object(file))
            else:
                whole = integrity.json_object(folder / name / "tokenizer.json")
                found.append(whole.get("model", {}).get("vocab", {}))
    return found


def _predicts_v(configs: Configs) -> bool:
    return configs["scheduler"].get("prediction_type") == "v_prediction"


def _marks(kind: Kind, configs: Configs) -> dict[str, Tensor]:
    """Tensors whose names alone say something, and the numbers of positions of CLIP-L."""
    found: dict[str, Tensor] = {}
    if kind.name.startswith("sdxl"):
        if _predicts_v(configs):
            found[_V] = torch.empty(0)
        if configs["scheduler"].get("rescale_betas_zero_snr"):
            found[_ZERO] = torch.empty(0)
    if kind.name in ("sd1", "sdxl") and "text_encoder" in configs:
        length = configs["text_encoder"]["max_position_embeddings"]
        prefix = kind.parts["text_encoder"].prefixes[0]
        found[prefix + text.IDS] = torch.arange(length).expand(1, -1)
    return found


def _needs_config(kind: Kind, configs: Configs) -> bool:
    unet = configs["unet"]
    shape = list(unet["block_out_channels"]), unet["layers_per_block"]
    return _predicts_v(configs) or shape != ([320, 640, 1280, 1280], 2)


def _notes(kind: Kind, configs: Configs, tensors: Mapping[str, Tensor]) -> list[str]:
    found, v = [], _predicts_v(configs)
    if kind.name == "sd1" and v:
        found.append(
            "ComfyUI takes every Stable Diffusion 1 for one that predicts eps, and this one"
            " predicts v: put its node ModelSamplingDiscrete behind the loader, with v_prediction"
        )
    if kind.name == "sd2":
        value = tensors.get(_GUESSED)
        guess = value is not None and value.float().std(correction=0).item() > _V_ABOVE
        if guess != v:
            takes, true = ("v", "eps") if guess else ("eps", "v")
            found.append(
                f"ComfyUI will take it for one that predicts {takes}, and it predicts {true}: put"
                f" its node ModelSamplingDiscrete behind the loader, with {_NODE[true]}"
            )
    if kind.name in ("sd1", "sd2") and configs["scheduler"].get("rescale_betas_zero_snr"):
        found.append(
            "its noise ends at a signal of zero, which no such file can say: set zsnr in ComfyUI's"
            " ModelSamplingDiscrete, and 'Zero Terminal SNR' in A1111's settings"
        )
    return found


_NODE = {"v": "v_prediction", "eps": "eps"}
