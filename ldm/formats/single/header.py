"""What stands beside the tensors of a file: ModelSpec's keys, and all of the folder that is no
tensor.

    modelspec.*     title, architecture, prediction, resolution, hash of the tensors (1.0.0)
    ldm.configs     {"unet/config.json": TEXT, "tokenizer_3/spiece.model": {"base64": ...}, ...}

ModelSpec also asks for a date, which is left out: the same model is the same file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.formats.integrity import is_part, json_object
from ldm.formats.recognised import INDEX, metadata
from ldm.formats.single.families import NONE, Configs, Kind

CONFIGS = "ldm.configs"
HASH = "modelspec.hash_sha256"
UNKNOWN = "0x" + "0" * 64
"""What the hash is before the tensors are written."""

_SPEC = "1.0.0"
_CODE = "https://github.com/"
_IMPLEMENTATION = {
    "sd1": _CODE + "CompVis/stable-diffusion",
    "sd2": _CODE + "Stability-AI/stablediffusion",
    "flux": _CODE + "black-forest-labs/flux",
}
_GENERATIVE = _CODE + "Stability-AI/generative-models"
_WEIGHTS = re.compile(r".+\.(safetensors|bin|ckpt|pt|pth|msgpack|h5|onnx|gguf)")
_PATH = re.compile(r"(?:\w[\w-]*/)?\w[\w.-]*")
_LARGEST = 50_000_000  # bytes of one file: a tokenizer of 250,000 tokens has 17 million
LEFT_OUT = ("safety_checker", "image_encoder")
"""Networks beside the model, which no single file holds."""


def files_of(folder: Path) -> dict[str, bytes]:
    """All in a pipeline folder that its index lists and that is no weights, by path.

    Of ``LEFT_OUT`` nothing, and the index says so.
    """
    index = json_object(folder / INDEX)
    without = [name for name in LEFT_OUT if is_part(index.get(name))]
    if without:
        index |= {name: [None, None] for name in without}
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    else:
        text = (folder / INDEX).read_text(encoding="utf-8")
    found = {INDEX: text.encode()}
    for part in sorted(name for name, entry in index.items() if is_part(entry)):
        for file in sorted((folder / part).glob("*")):
            if file.is_file() and not _WEIGHTS.fullmatch(file.name) and file.name[0] != ".":
                found[f"{part}/{file.name}"] = file.read_bytes()
    return found


def packed(files: Mapping[str, bytes]) -> str:
    """``files`` as a text."""

    def entry(data: bytes) -> Any:
        try:
            return data.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(data).decode()}

    return json.dumps({path: entry(data) for path, data in files.items()}, sort_keys=True)


def unpacked(file: Path) -> dict[str, bytes] | None:
    """The files that the header of ``file`` holds, by path; None: there are none.

    Raises:
        ValueError: they are damaged, or would leave their folder; the message names the file.
    """
    text = metadata(file).get(CONFIGS)
    if text is None:
        return None
    try:
        entries = json.loads(text)
        found = {path: _data(entry) for path, entry in entries.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, binascii.Error):
        raise ValueError(f"{file}: {CONFIGS} in its header is damaged: export it again") from None
    for path, data in found.items():
        if not _PATH.fullmatch(path) or _WEIGHTS.fullmatch(path) or len(data) > _LARGEST:
            raise ValueError(f"{file}: {CONFIGS} in its header holds {path[:60]!r}, no config")
    if INDEX not in found:
        raise ValueError(f"{file}: {CONFIGS} in its header lacks {INDEX}: export it again")
    return found


def _data(entry: Any) -> bytes:
    if isinstance(entry, str):
        return entry.encode()
    return base64.b64decode(entry["base64"], validate=True)


def of(kind: Kind, title: str, configs: Configs, files: Mapping[str, bytes]) -> dict[str, str]:
    """The metadata of a file, its hash still ``UNKNOWN``."""
    predicts = configs.get("scheduler", {}).get("prediction_type", "epsilon")
    told = {
        "format": "pt",
        "modelspec.sai_model_spec": _SPEC,
        "modelspec.architecture": _architecture(kind, predicts),
        "modelspec.implementation": _IMPLEMENTATION.get(kind.name, _GENERATIVE),
        "modelspec.title": title,
        HASH: UNKNOWN,
        CONFIGS: packed(files),
    }
    if kind is NONE:
        told["modelspec.implementation"] = "diffusers"
    if (side := resolution(configs)) is not None:
        told["modelspec.resolution"] = f"{side}x{side}"
    if kind.name not in ("sd3", "flux"):
        told["modelspec.prediction_type"] = "v" if predicts == "v_prediction" else predicts
    return told


def _architecture(kind: Kind, predicts: str) -> str:
    if kind.name != "sd2":
        return kind.architecture
    return kind.architecture + ("-768-v" if predicts == "v_prediction" else "-512")


def resolution(configs: Configs) -> int | None:
    """Pixels along a side of the pictures that a model draws, where its folder says it."""
    network = configs.get("unet") or configs.get("transformer") or {}
    side, vae = network.get("sample_size"), configs.get("vae")
    if not isinstance(side, int):
        return None
    return side if vae is None else side * 2 ** (len(vae["block_out_channels"]) - 1)


def hash_of_tensors(file: Path) -> str:
    """SHA-256 of all that follows the header, as ModelSpec writes it."""
    digest = hashlib.sha256()
    for block in _tensors(file):
        digest.update(block)
    return f"0x{digest.hexdigest()}"


def _tensors(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(1 << 20):
            yield block


def put_hash(file: Path) -> None:
    """Writes the hash of the tensors into the header, in which it is ``UNKNOWN``."""
    found = hash_of_tensors(file).encode()
    with file.open("r+b") as stream:
        head = stream.read(int.from_bytes(stream.read(8), "little"))
        stream.seek(8 + head.index(UNKNOWN.encode()))
        stream.write(found)
