"""Files of tensors: what is written twice is the same file.

    8 bytes: length of the header | header, JSON | tensors

safetensors sorts the tensors but not the metadata, whose order in the header changes from process
to process: here it is sorted too, so that files can be compared, hashed and linked by their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.storage.disk import let_read

_NETWORK = "diffusion_pytorch_model.safetensors"
_LENGTH = 8  # bytes, little-endian
_METADATA = "__metadata__"


def write_tensors(
    tensors: Mapping[str, Tensor],
    file: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``tensors`` as a safetensors file whose bytes depend on nothing but them and
    ``metadata``.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(ready, file, dict(metadata) if metadata else None)
    let_read(Path(file))
    if metadata and len(metadata) > 1:
        _sort_metadata(Path(file))


def read_network(folder: Path) -> dict[str, Tensor]:
    """All tensors of a network that diffusers has saved in ``folder``: of one file, or where they
    were more than 10 GB of several, which an index lists.
    """
    index = folder / f"{_NETWORK}.index.json"
    if not index.is_file():
        return load_file(folder / _NETWORK)
    files = sorted({*json.loads(index.read_text())["weight_map"].values()})
    return {name: value for file in files for name, value in load_file(folder / file).items()}


def _sort_metadata(file: Path) -> None:
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(_LENGTH), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The same entries in another order: the tensors stay where they are.
        assert len(text) <= length, f"{file}: a header grew from {length} to {len(text)} bytes"
        stream.seek(_LENGTH)
        stream.write(text.ljust(length))
