"""Models that a config or a command names, as folders of this machine.

runs/x/final              a folder: itself
model.safetensors         a whole model in one file: its folder, made once below ``cache_root()``
OWNER/NAME[@REVISION]     a repository of the Hub: its snapshot, which is named after the commit
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ldm.formats.recognised import INDEX, whole
from ldm.storage.cache_root import cache_root

log = logging.getLogger(__name__)

_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_PARTS = [INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
_OTHERS = ["*.fp16.*", "*.bf16.*", "*non_ema*", "*onnx*", "*openvino*", "*flax*"]
"""Of a repository what a pipeline is made of, and what of that is there for others."""


def of_the_hub(model: str | Path) -> bool:
    """Whether ``model`` is meant as a repository of the Hub: OWNER/NAME, and OWNER is no folder."""
    text = str(model)
    return _HUB.fullmatch(text) is not None and not Path(text.partition("/")[0]).exists()


def folder_of(model: str | Path) -> Path:
    """The folder of ``model``; a path that is no whole model is itself, whatever lies there.

    Where there is no network (``HF_HUB_OFFLINE=1``) the Hub's cache alone is asked.

    Raises:
        OSError: the Hub has no such repository, or nobody can look; the message is one line.
        ValueError: the file is damaged, or says nothing of its configs; likewise.
    """
    path = Path(model)
    if whole(path):
        return _imported(path)
    return _snapshot(str(model)) if of_the_hub(model) else path


def autoencoder_of(file: Path, model: Path | None) -> Path:
    """The folder of the autoencoder in ``file``, one of it alone or of a whole model, made once
    below ``cache_root()``.

    Args:
        file: a safetensors file, in the layout of A1111 and ComfyUI, or in a folder of diffusers.
        model: a pipeline folder with an autoencoder of the same shape, whose config it has where
            the file says nothing of its own.

    Raises:
        OSError: nothing tells its config.
        ValueError: the file is pickled, damaged or of another shape; the message is one line.
    """
    from ldm.formats.single.folder import write_autoencoder
    from ldm.formats.single.read import SingleFile

    if (file.parent / "config.json").is_file() and file.name.startswith("diffusion_pytorch_model"):
        return file.parent
    alone = file.suffix.lower() != ".safetensors" or not whole(file)
    read = SingleFile(file, only="vae" if alone else None)
    beside = model / "vae" / "config.json" if model and read.configs is None else None
    stated = beside.read_text(encoding="utf-8") if beside and beside.is_file() else ""
    return _made(file, "config.json", lambda out: write_autoencoder(read, out, model), stated)


def _imported(file: Path) -> Path:
    from ldm.formats.single.folder import to_folder
    from ldm.formats.single.read import SingleFile

    return _made(file, INDEX, lambda out: to_folder(SingleFile(file), out))


def _made(file: Path, last: str, write: Callable[[Path], None], beside: str = "") -> Path:
    """The folder of ``file`` in the cache, which ``write`` makes unless it is there with its
    ``last`` file; of the same file another for other text ``beside`` it.
    """
    state = file.stat()
    told = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}{beside}"
    name = f"{file.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    folder = cache_root() / "models" / name
    if (folder / last).is_file():
        return folder
    log.info("%s: its folder is written to %s, once", file, folder)
    mine = folder.with_name(f"{name}.{os.getpid()}")
    write(mine)
    try:
        mine.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(mine)
        if not (folder / last).is_file():
            raise
    return folder


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    found = _HUB.fullmatch(model)
    assert found is not None
    try:
        folder = snapshot_download(
            found["name"],
            revision=found["revision"],
            allow_patterns=_PARTS,
            ignore_patterns=_OTHERS,
        )
    except Exception as error:  # no network, no permission, no such repository or revision
        line = " ".join(str(error).split())[:200]
        raise OSError(f"{model}: no such folder is here, and of the Hub: {line}") from error
    log.info("%s is %s", model, folder)
    return Path(folder)
