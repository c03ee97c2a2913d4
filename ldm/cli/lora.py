"""``ldm lora IN OUT --to kohya``: a LoRA in the other format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import fail, there


class LoraFormat(StrEnum):
    """Whose LoRA files."""

    diffusers = "diffusers"
    kohya = "kohya"


class LoraFamily(StrEnum):
    """Whose transformers have a place in kohya's format."""

    sd3 = "sd3"


def convert_lora(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A LoRA: its file or folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors, or a folder.")],
    to: Annotated[LoraFormat, typer.Option(help="The format to write.")],
    family: Annotated[
        LoraFamily | None, typer.Option(help="Of a LoRA of a transformer, for kohya's format.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Half precision (float16).")] = False,
) -> None:
    """Converts a LoRA between diffusers' format and kohya's (A1111, ComfyUI)."""
    from safetensors import SafetensorError

    from ldm.formats import lora
    from ldm.formats.lora_arithmetic import halved

    target = out if out.suffix == ".safetensors" else out / lora.FILE
    if there(target):
        fail(f"{target} is there already: remove it, or choose another name")
    try:
        updates = lora.read(source)
        updates = halved(updates) if half else updates
        written = lora.write(updates, out, to.value, told=lora.told(source), family=family)
    except (ValueError, OSError, SafetensorError) as error:
        fail(error)
    for part, modules in updates.items():
        ranks = sorted({update.rank for update in modules.values()})
        print(f"{part}: {len(modules)} modules of rank {', '.join(map(str, ranks))}")
    print(written)
