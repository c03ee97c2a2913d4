"""A file as a pipeline folder: what it holds, and what it takes from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ldm.formats import integrity
from ldm.formats.recognised import INDEX
from ldm.formats.single.read import SingleFile, classes
from ldm.storage.folders import replace
from ldm.storage.tensors import write_tensors

_OPTIONAL = {"text_encoder_3": "tokenizer_3"}
"""Networks without which their pipeline draws as well, with what goes with them."""
_ABOUT = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
"""What of a repository of the Hub is no weights."""


def prepare(
    source: SingleFile,
    folder: Path,
    configs: Path | None,
    vae: Path | None,
    given: Collection[str] = (),
) -> dict[str, Path | SingleFile]:
    """Unpacks all of the folder of a file that is no tensor, and finds its networks.

    Args:
        source: the file.
        folder: where to unpack.
        configs: a pipeline folder of the same kind, for what the file does not hold; None: what
            its header holds, or else the repository of the Hub that published the kind.
        vae: an autoencoder in place of the file's: its folder, that of a pipeline, or a file.
        given: parts that come from elsewhere.

    Returns:
        By part, the folder that its weights lie in, or the file.

    Raises:
        OSError: nothing tells its configs.
        ValueError: a network is nowhere; the message is one line.
    """
    if configs is None and source.configs is None:
        configs = of_the_hub(source)
    source.unpack(folder, configs)
    index = integrity.json_object(folder / INDEX)
    found: dict[str, Path | SingleFile] = {}
    for part in classes(source.path, folder):
        if part in given:
            continue
        if part == "vae" and vae is not None:
            found[part] = _autoencoder(vae, folder)
        elif source.holds(part):
            found[part] = source
        elif configs is not None and integrity.weights(configs / part) is not None:
            found[part] = configs / part
        elif part in _OPTIONAL:
            for name in (part, _OPTIONAL[part]):
                index[name] = [None, None]
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        else:
            way = "--vae FOLDER or FILE" if part == "vae" else "a --config FOLDER with its weights"
            raise ValueError(f"{source.path} holds no {part}: name one, {way}")
    return found


def of_the_hub(source: SingleFile) -> Path:
    """Configs and tokenizers of the repository that published the kind of ``source``; where there
    is no network, as far as they are in the cache.

    Raises:
        OSError: they cannot be had.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    shapes = {name: torch.empty(shape, device="meta") for name, shape in source.shapes.items()}
    name = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, allow_patterns=_ABOUT))
    except Exception as error:  # no network, no permission, no such file in the cache
        line = " ".join(str(error).split())[:150]
        raise OSError(
            f"{source.path} holds tensors alone, of the kind {source.kind.name}: configs and"
            f" tokenizer come from a pipeline folder of the same kind, --config FOLDER (of the Hub,"
            f" {name}: {line})"
        ) from None


def _autoencoder(path: Path, folder: Path) -> Path | SingleFile:
    """Where the weights of the autoencoder ``path`` are, whose config is put into ``folder``."""
    if path.is_file():
        return SingleFile(path, only="vae")
    inside = path / "vae" if (path / "vae" / "config.json").is_file() else path
    config = integrity.json_object(inside / "config.json")
    integrity.check_network(inside, config, pickled=False)
    shutil.copyfile(inside / "config.json", folder / "vae" / "config.json")
    return inside


def networks(
    found: dict[str, Path | SingleFile], folder: Path, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The networks that ``prepare`` found, by part; those of folders are left to diffusers, in
    ``folder``.
    """
    made = {}
    for part, where in found.items():
        if isinstance(where, SingleFile):
            made[part] = where.network(folder, part, dtype)
        else:
            _link_weights(where, folder / part)
    return made


def _link_weights(source: Path, target: Path) -> None:
    for file in integrity.weights(source) or []:
        (target / file.name).symlink_to(file.resolve())
    for file in source.glob("*.index.json"):
        shutil.copyfile(file, target / file.name)


def to_folder(
    source: SingleFile, out: Path, configs: Path | None = None, vae: Path | None = None
) -> None:
    """Makes ``out``, which is none yet, the pipeline folder of a file, in one step; arguments and
    errors are those of ``prepare``.
    """

    def put_in(staging: Path) -> None:
        found = prepare(source, staging, configs, vae)
        for part, cls in classes(source.path, staging).items():
            where, target = found[part], staging / part
            if isinstance(where, SingleFile):
                _write(where.weights(staging, part), target, cls)
            else:
                for file in (*(integrity.weights(where) or ()), *where.glob("*.index.json")):
                    shutil.copyfile(file, target / file.name)

    replace(out, put_in, lambda _: (), last=INDEX)


def write_autoencoder(source: SingleFile, out: Path, model: Path | None) -> None:
    """Makes ``out``, which is none yet, the folder of the autoencoder of a file.

    Args:
        source: the file.
        out: the folder.
        model: a pipeline folder of the same kind, for a file without a config.

    Raises:
        ValueError: the file holds none, or one of another shape than ``model``'s; the message is
            one line.
        OSError: nothing tells its config.
    """
    if not source.holds("vae"):
        raise ValueError(f"{source.path} holds no autoencoder: leave vae out, or name another file")
    if source.configs is None and not (model and (model / "vae" / "config.json").is_file()):
        raise OSError(
            f"{source.path} holds tensors alone: give a model with an autoencoder of the same shape"
            " beside it, whose config it takes, or the folder of one"
        )

    def put_in(staging: Path) -> None:
        with TemporaryDirectory() as unpacked:
            source.unpack(Path(unpacked), model if source.configs is None else None)
            tensors = source.weights(Path(unpacked), "vae")
            shutil.copyfile(Path(unpacked) / "vae" / "config.json", staging / "config.json")
        write_tensors(tensors, staging / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    replace(out, put_in, lambda _: (), last="config.json")


def _write(tensors: dict[str, Tensor], folder: Path, cls: str) -> None:
    """As transformers or diffusers do: in one file, or in those that an index lists."""
    stem = "model" if cls.startswith(("CLIP", "T5")) else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        write_tensors(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    shards: dict[str, Any] = {}
    for name, shard in integrity.json_object(index)["weight_map"].items():
        shards.setdefault(Path(shard).name, {})[name] = tensors[name]
    for shard, mine in shards.items():
        write_tensors(mine, folder / shard, {"format": "pt"})
