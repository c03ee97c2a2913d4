"""What a path is that is no pipeline folder, and what to do with it: read from names and headers,
so that it is told before anything is imported or allocated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldm.formats.pickled import SUFFIXES, converted

INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
WORD = "learned_embeds.safetensors"
"""What folders of diffusers hold that are one LoRA, or one word of textual inversion."""

_HEADER = 100_000_000  # bytes, the most that safetensors reads
_RUN = "final"
_FILES = {
    LORA: "the folder of a LoRA: it goes with --lora, or"
    " load_lora_weights, and the model that it was trained on is the folder",
    WORD: "the folder of a word of textual inversion: it goes with"
    " --embedding, or load_textual_inversion",
}
_SINGLE = "write it as a folder: ldm import FILE FOLDER"
_WHOLE = re.compile(r"model\.diffusion_model\.|(?:joint|double)_blocks\.|ldm\.\w+\.")
"""What names of tensors begin with in files of whole models (``ldm.formats.single``)."""


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: shape, dtype and place of every tensor by its name.

    Raises:
        ValueError: it has none, or not all of its tensors; the message names the file.
    """
    return _read(file)[0]


def metadata(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; ``ValueError`` as ``header``
    has it.
    """
    return _read(file)[1]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _HEADER:
                raise ValueError("it does not begin with a header")
            found = json.loads(stream.read(length))
        told = found.pop("__metadata__", None) or {}
        told = {key: value for key, value in told.items() if isinstance(value, str)}
        ends = [entry["data_offsets"][1] for entry in found.values()]
        if not all(type(side) is int for entry in found.values() for side in entry["shape"]):
            raise TypeError
        there = file.stat().st_size - 8 - length
        if max(ends, default=0) != there:
            raise ValueError(f"it holds {there:,} bytes of {max(ends, default=0):,}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        line = str(error) if type(error) is ValueError else "it does not begin with a header"
        raise ValueError(
            f"{file} is no whole safetensors file ({line}): copy or download it again"
        ) from None
    return found, told


def told(path: Path) -> str | None:
    """What ``path`` is instead, and the way out; None if it is a pipeline folder."""
    if path.is_file():
        return f"{path} is a file, not a pipeline folder: {_file(path)}"
    if not path.is_dir():
        return f"{path}: there is no such folder"
    if (path / INDEX).is_file():
        return None
    for name, what in _FILES.items():
        if (path / name).is_file():
            return f"{path} is {what}"
    if (path / _RUN / INDEX).is_file():
        return f"{path} is the folder of a run: its result is {path / _RUN}"
    if (path / "config.json").is_file() and (path.parent / INDEX).is_file():
        return f"{path} is one part of a pipeline: name the folder that it lies in, {path.parent}"
    return f"{path} holds no {INDEX}: it is not a pipeline folder"


def whole(path: Path) -> bool:
    """Whether ``path`` is a whole model in one file.

    Raises:
        ValueError: it is a damaged file.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    return any(map(_WHOLE.match, header(path)))


def _file(file: Path) -> str:
    single = _SINGLE.replace("FILE", str(file)).replace("FOLDER", str(file.with_suffix("")))
    if file.name == INDEX:
        return f"name the folder that it lies in, {file.parent}"
    if file.suffix.lower() in SUFFIXES:
        return (
            f"it is pickled; if it is a whole model, {converted(file, 'model')} writes it as a"
            f" .safetensors, and ldm import that as a folder"
        )
    if file.suffix.lower() != ".safetensors":
        return "a folder with a model_index.json is needed"
    names = list(header(file))
    if any(re.search(r"lora_|\.lora\.|_lora\.", name) for name in names):
        return "it is a LoRA, which goes with --lora, or load_lora_weights"
    if len(names) == 1 or set(names) == {"clip_l", "clip_g"}:
        return "it is a word of textual inversion: --embedding, or load_textual_inversion"
    if any(map(_WHOLE.match, names)):
        return f"it is a whole model in one file; {single}"
    return f"it holds {len(names):,} tensors, and a folder with a model_index.json is needed"
