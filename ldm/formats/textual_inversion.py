"""Files of textual inversion: the embeddings of a new word, as diffusers writes and reads them.

    learned_embeds.safetensors: one tensor, ``k d`` or ``d``, under the name of the word

AUTOMATIC1111's safetensors hold the tensor as ``emb_params``. Of a model with two text encoders,
SDXL, there are two, ``clip_l`` and ``clip_g``, as A1111, kohya's trainer and diffusers' own have
them. The word is then the file's name; what is written here says it in the header, key ``token``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.formats import pickled, recognised
from ldm.models.tokenizer import unreadable
from ldm.storage.tensors import write_tensors

FILE = recognised.WORD
TOWERS = ("clip_l", "clip_g")
"""What files call the embeddings of the first text encoder and of the second."""
_NAMELESS = ("emb_params", *TOWERS)
VECTORS = 1_000
"""The most that a word may have."""
_LETTERS = 200
_TOKEN = "token"


def write(
    token: str,
    rows: Tensor | Sequence[Tensor],
    folder: str | PathLike[str],
    base: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the embeddings of ``token`` into ``folder`` and returns their file.

    Args:
        token: the word.
        rows: its embeddings ``k d``, or those of one text encoder or of two in their order.
        folder: made if it is not there.
        base: fingerprints (and settings) of the networks that it was learnt in, for the header.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | ({"base": json.dumps(dict(base), sort_keys=True)} if base else {})
    towers = [rows] if isinstance(rows, Tensor) else list(rows)
    if len(towers) == 1:
        write_tensors({token: towers[0]}, folder / FILE, header)
    else:
        named = zip(TOWERS, towers, strict=True)
        write_tensors(dict(named), folder / FILE, header | {_TOKEN: token})
    return folder / FILE


def read(path: str | PathLike[str], file: str | None = None) -> tuple[str, Tensor]:
    """The word and its embeddings ``k d`` in a file for one text encoder; else as ``read_towers``.

    Raises:
        ValueError: there is no such file, or it holds something else; the message is one line.
    """
    token, towers = read_towers(path, file)
    if len(towers) > 1:
        raise ValueError(f"{path} is for two text encoders ({', '.join(TOWERS)}), and here is one")
    return token, towers[0]


def read_towers(
    path: str | PathLike[str], file: str | None = None
) -> tuple[str, tuple[Tensor, ...]]:
    """The word in a file, and its embeddings ``k d`` of each text encoder, in their order.

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
            told, names = opened.metadata() or {}, list(opened.keys())
            both = set(names) == set(TOWERS)
            shapes = [opened.get_slice(name).get_shape() for name in names]
            if not (both or len(names) == 1) or not all(len(shape) in (1, 2) for shape in shapes):
                raise ValueError(
                    f"{chosen} holds {len(names)} tensors: a word of textual inversion is one, a"
                    f" row for each of its vectors, or {' and '.join(TOWERS)} for two text encoders"
                )
            counts = [math.prod(shape[:-1]) for shape in shapes]
            if max(counts) > VECTORS:  # before they are read
                raise ValueError(
                    f"{chosen} holds {max(counts):,} vectors, and no text has room for more than"
                    f" {VECTORS:,}"
                )
            if len(set(counts)) > 1:
                raise ValueError(f"{chosen} does not hold as many vectors for both text encoders")
            towers = [opened.get_tensor(name) for name in (TOWERS if both else names)]
    except (OSError, SafetensorError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{chosen} cannot be read as safetensors: {line}") from None
    token = told.get(_TOKEN, chosen.stem) if names[0] in _NAMELESS else names[0]
    for rows in towers:
        if not rows.numel() or not rows.is_floating_point() or not rows.float().isfinite().all():
            raise ValueError(f"{chosen} holds no vectors that a text encoder could read")
    if not token.strip() or unreadable(token) or len(token) > _LETTERS:
        raise ValueError(f"{chosen} is of no word: {token[:_LETTERS]!r}")
    return token, tuple(rows.reshape(-1, rows.shape[-1]) for rows in towers)
