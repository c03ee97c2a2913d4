"""Pickled weights run code when they are read: they are named, with the way out, and not read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal

Kind = Literal["LoRA", "embedding", "model"]
SUFFIXES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")
# AUTOMATIC1111's words lie a level deeper than diffusers', and their name is the file's.
_WORD = 't["string_to_param"]["*"].detach()'
_READ: dict[Kind, str] = {
    "LoRA": "t",
    # What trainers keep beside the weights is no tensor.
    "model": (
        '{k: v.contiguous() for k, v in t.get("state_dict", t).items() if hasattr(v, "shape")}'
    ),
    "embedding": f'{{"emb_params": {_WORD}}} if "string_to_param" in t else t',
}


def refuse(file: Path, kind: Kind) -> None:
    """Lets safetensors alone pass.

    Raises:
        ValueError: ``file`` is something else; of pickled weights the message is the line that
            converts them, and runs none of their code.
    """
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        return
    if suffix not in SUFFIXES:
        raise ValueError(f"{file} is no .safetensors, and nothing else is read")
    raise ValueError(
        f"{file} is pickled and could run code when it is read; this converts it without:"
        f" {converted(file, kind)}"
    )


def converted(file: Path, kind: Kind) -> str:
    """The line that writes a pickled file as safetensors beside it."""
    source, target = (json.dumps(str(f)) for f in (file, file.with_suffix(".safetensors")))
    program = (
        "import torch; from safetensors.torch import save_file;"
        f" t = torch.load({source}, weights_only=True); save_file({_READ[kind]}, {target})"
    )
    return f"python -c {shlex.quote(program)}"
