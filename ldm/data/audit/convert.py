"""A copy of a source that every program reads alike: upright sRGB PNGs and ``metadata.jsonl``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PurePosixPath

from ldm.data.images import Colour, flatten
from ldm.data.source import Source
from ldm.errors import DataError
from ldm.progress import track

_WHITE: Colour = (255, 255, 255)


def convert(source: Source, out: Path, background: Colour = _WHITE) -> int:
    """Writes every usable picture of ``source`` to the new folder ``out``; returns their number.

    ``cat.jpg`` becomes ``cat.jpg.png``. The folder appears when all of it is written.

    Args:
        source: is not changed.
        out: must not exist.
        background: behind what is transparent.

    Raises:
        DataError: ``out`` exists, a picture cannot be read any more, or a file cannot be written.
    """
    if os.path.lexists(out):
        raise DataError(f"{out} is there already: remove it, or choose another folder")
    partial = out.with_name(f".{out.name}-{os.getpid()}.partial")
    examples = source.examples
    try:
        partial.mkdir(parents=True)
        with (partial / "metadata.jsonl").open("w", encoding="utf-8") as table:
            for i in track(range(len(examples)), f"writing {out}"):
                example = examples[i]
                name = _name(example.key)
                if (partial / name).exists():  # a.jpg, and beside it a.jpg.png
                    name = f"{name[:-4]}-{i}.png"
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                flatten(source.load(i), background).save(partial / name)
                row = {"file_name": name, "text": list(example.captions)}
                table.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(examples)


def _name(key: str) -> str:
    """The file of a key, which need not be that of a file; never out of the folder."""
    parts = [part for part in PurePosixPath(key).parts if part not in ("/", "..")]
    name = "/".join(part.lstrip(".") or "_" for part in parts)
    return name if name.lower().endswith(".png") else f"{name}.png"
