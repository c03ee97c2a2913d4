"""Networks that stand beside a U-Net: folders as diffusers saves them, files of IP-Adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter

from ldm.formats import integrity

KINDS = {"controlnet": ControlNetModel, "adapter": T2IAdapter}
"""By the component of a pipeline."""

_IP_FOLDERS = ("models", "sdxl_models")  # of the repository h94/IP-Adapter
_TOWER = "image_encoder"


def beside(part: str, given: Any, asked: Mapping[str, Any]) -> Any:
    """``given``, one network or several, each of them read where it is the path of its folder.

    Args:
        part: the component of a pipeline that they are.
        given: networks, folders of them, or names on the Hub.
        asked: ``dtype`` and ``use_safetensors`` of the pipeline that they stand in.

    Raises:
        OSError: there is no such folder, or a file of it is missing; the message is one line.
        ValueError: something in it is damaged, or it holds another network.
    """
    if isinstance(given, (list, tuple)):
        return [beside(part, one, asked) for one in given]
    if not isinstance(given, (str, os.PathLike)):
        return given
    folder, options = Path(given), {"use_safetensors": asked.get("use_safetensors", True)}
    dtype = asked.get("dtype") or asked.get("torch_dtype")
    options["torch_dtype"] = dtype if isinstance(dtype, torch.dtype) else torch.float32
    if folder.exists() or not integrity.may_be_of_the_hub(str(given)):
        _check(folder, KINDS[part])
    try:
        return KINDS[part].from_pretrained(given, **options)
    except Exception as error:  # whatever diffusers, safetensors, the Hub or torch raise
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{given} cannot be read as a {KINDS[part].__name__}: {line}") from error


def _check(folder: Path, cls: type) -> None:
    if not folder.is_dir():
        raise OSError(f"{folder}: there is no such folder of a {cls.__name__}")
    config = integrity.json_object(folder / "config.json")
    kind = config.get("_class_name")
    if kind != cls.__name__:
        told = kind or "no network of diffusers"
        raise ValueError(f"{folder} holds no {cls.__name__}, but {told}")
    integrity.check_network(folder, config)


def ip_adapter(path: Path) -> dict[str, Any]:
    """What diffusers' ``load_ip_adapter`` is asked for to read the IP-Adapter at ``path``: a file,
    or a folder that holds one, itself or in ``models`` or ``sdxl_models``, its picture tower beside
    it in ``image_encoder``.

    Raises:
        OSError: there is nothing, or no picture tower beside it; the message is one line.
        ValueError: there is more than one, or no file of tensors; likewise.
    """
    if not path.exists():
        raise OSError(f"{path}: there is no such file or folder of an IP-Adapter")
    if path.is_file():
        file = path
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{file}: an IP-Adapter is read from .safetensors, whose reading runs no code"
            )
    else:
        places = (path, *(path / name for name in _IP_FOLDERS))
        found = next((f for f in (sorted(p.glob("*.safetensors")) for p in places) if f), [])
        if len(found) != 1:
            told = ", ".join(str(one.relative_to(path)) for one in found) or "none"
            raise ValueError(f"{path}: name one file of an IP-Adapter; there are {told}")
        (file,) = found
    if not (file.parent / _TOWER / "config.json").is_file():
        raise OSError(
            f"{file}: there is no {_TOWER} beside it, the picture tower that it was trained with"
        )
    return {
        "pretrained_model_name_or_path_or_dict": str(file.parent),
        "subfolder": "",
        "weight_name": file.name,
    }
