"""Files of textual inversion: the embeddings of a new word, as diffusers writes and reads them.

    learned_embeds.safetensors: one tensor, ``k d`` or ``d``, under the name of the word

AUTOMATIC1111's safetensors hold the tensor as ``emb_params``; the word is then the file's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "learned_embeds.safetensors"
_A1111 = "emb_params"


def write(
    token: str, rows: Tensor, folder: str | PathLike[str], base: Mapping[str, Any] | None = None
) -> Path:
    """Writes the embeddings ``k d`` of ``token`` into ``folder`` and returns their file.

    Args:
        token: the word.
        rows: its embeddings.
        folder: made if it is not there.
        base: fingerprints (and settings) of the networks that it was learnt in, for the header.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | ({"base": json.dumps(dict(base), sort_keys=True)} if base else {})
    save_file({token: rows.detach().cpu().contiguous()}, folder / FILE, header)
    return folder / FILE


def read(path: str | PathLike[str], file: str | None = None) -> tuple[str, Tensor]:
    """The word and its embeddings ``k d`` in a file.

    Args:
        path: the file, or its folder.
        file: which one of the folder; by default ``FILE``.

    Raises:
        ValueError: there is no such file, or it holds something else; the message is one line.
    """
    chosen = Path(path)
    if chosen.is_dir():
        chosen = chosen / (file or FILE)
    if not chosen.is_file():
        raise ValueError(f"{chosen}: there is no such file")
    if chosen.suffix != ".safetensors":
        raise ValueError(f"{chosen} is no .safetensors, and nothing else is read")
    try:
        tensors = load_file(chosen)
    except (OSError, SafetensorError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{chosen} cannot be read as safetensors: {line}") from None
    if len(tensors) != 1 or next(iter(tensors.values())).ndim not in (1, 2):
        raise ValueError(
            f"{chosen} holds {len(tensors)} tensors: a word of textual inversion is one, a row for"
            " each of its vectors"
        )
    ((token, rows),) = tensors.items()
    return (chosen.stem if token == _A1111 else token), rows.reshape(-1, rows.shape[-1])
