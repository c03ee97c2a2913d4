"""Files of textual inversion: the embeddings of a new word, as diffusers writes and reads them.

    learned_embeds.safetensors: one tensor, ``k d`` or ``d``, under the name of the word

AUTOMATIC1111's safetensors hold the tensor as ``emb_params``; the word is then the file's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.formats import pickled
from ldm.models.tokenizer import unreadable
from ldm.storage.tensors import write_tensors

FILE = "learned_embeds.safetensors"
_A1111 = "emb_params"
VECTORS = 1_000
"""The most that a word may have."""
_LETTERS = 200


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
    write_tensors({token: rows}, folder / FILE, header)
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
    pickled.refuse(chosen, "embedding")
    try:
        with safe_open(chosen, framework="pt") as opened:
            names = list(opened.keys())
            shapes = [opened.get_slice(name).get_shape() for name in names]
            if len(names) != 1 or len(shapes[0]) not in (1, 2):
                raise ValueError(
                    f"{chosen} holds {len(names)} tensors: a word of textual inversion is one, a"
                    " row for each of its vectors"
                )
            if math.prod(shapes[0][:-1]) > VECTORS:  # before they are read
                raise ValueError(
                    f"{chosen} holds {shapes[0][0]:,} vectors, and no text has room for more than"
                    f" {VECTORS:,}"
                )
            rows = opened.get_tensor(names[0])
    except (OSError, SafetensorError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{chosen} cannot be read as safetensors: {line}") from None
    token = chosen.stem if names[0] == _A1111 else names[0]
    if not rows.numel() or not rows.is_floating_point() or not rows.float().isfinite().all():
        raise ValueError(f"{chosen} holds no vectors that a text encoder could read")
    if not token.strip() or unreadable(token) or len(token) > _LETTERS:
        raise ValueError(f"{chosen} is of no word: {token[:_LETTERS]!r}")
    return token, rows.reshape(-1, rows.shape[-1])
