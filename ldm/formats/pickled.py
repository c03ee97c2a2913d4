"""Pickled weights run code when they are read: they are named, with the way out, and not read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal

SUFFIXES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")
# AUTOMATIC1111's words lie a level deeper than diffusers', and their name is the file's.
_WORD = 't["string_to_param"]["*"].detach()'
_READ = {
    "LoRA": "t",
    "embedding": f'{{"emb_params": {_WORD}}} if "string_to_param" in t else t',
}


def refuse(file: Path, kind: Literal["LoRA", "embedding"]) -> None:
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
    source, target = (json.dumps(str(f)) for f in (file, file.with_suffix(".safetensors")))
    program = (
        "import torch; from safetensors.torch import save_file;"
        f" t = torch.load({source}, weights_only=True); save_file({_READ[kind]}, {target})"
    )
    raise ValueError(
        f"{file} is pickled and could run code when it is read; this converts it without:"
        f" python -c {shlex.quote(program)}"
    )
