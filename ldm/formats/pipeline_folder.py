"""Folders of pipelines in diffusers' layout: opened after a look at what is in them, and written in
one step.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.formats import integrity
from ldm.formats.recognised import INDEX, told, whole
from ldm.formats.side_networks import KINDS, beside
from ldm.formats.single.loader import unpacked
from ldm.models.clip import save_text_encoder
from ldm.models.control import ip_adapters_of
from ldm.models.lora import adapted, fused
from ldm.models.strip_paths import strip_paths
from ldm.models.tokenizer import save_tokenizer
from ldm.models.wrapped import bare
from ldm.sampling.defaults import stated_by
from ldm.storage.folders import replace

_KEPT = ("requires_safety_checker", "sampling", "force_zeros_for_empty_prompt",
         "requires_aesthetics_score")  # fmt: skip
"""What a pipeline states beside its components."""


def opened(read: Callable[..., Any], path: str | os.PathLike[str], asked: Mapping[str, Any]) -> Any:
    """What ``read``, diffusers' ``from_pretrained``, makes of a folder of this machine, of a whole
    model in one file, or of a repository of the Hub.

    Args:
        read: called with the path and what is asked for.
        path: the folder, the file, or the repository's name.
        asked: keywords of ``read``; ``use_safetensors=False`` allows pickled weights where there
            are no others.

    Raises:
        OSError: there is no such folder, or a file of it is missing; the message is one line.
        ValueError: something in it is damaged, or larger than its weights; likewise.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise ValueError(f"a pipeline is opened by the path of its folder, not by {path!r}")
    asked = dict(asked)
    if pickled := asked.get("use_safetensors") is False:
        asked["use_safetensors"] = None  # today's text encoders are safetensors even there
    for part in KINDS:
        if asked.get(part) is not None:
            asked[part] = beside(part, asked[part], asked)
    folder = Path(path)
    if whole(folder):
        with unpacked(folder, asked) as (name, found):
            return opened(read, name, found)
    if isinstance(path, str) and not folder.exists() and integrity.may_be_of_the_hub(path):
        try:
            return read(path, **asked)
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise OSError(f"{path}: no such folder is here, and of the Hub: {line}") from error
    if wrong := told(folder):
        raise OSError(wrong)
    parts = integrity.check(folder, asked, pickled or asked.get("use_safetensors") is None)
    try:
        pipe = read(str(folder), **asked)
    except Exception as error:  # whatever diffusers, transformers, tokenizers or torch raise
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder} cannot be opened as a pipeline: {line}") from error
    for name in parts:
        integrity.check_all_there(folder / name, getattr(pipe, name, None), asked.get("variant"))
    if "sampling" not in asked:
        pipe.register_to_config(sampling=stated_by(folder))
    return pipe


def merged(pipe: Any) -> Any:
    """``pipe``, or where LoRAs are fused into its weights one of which these are the weights.

    Raises:
        ValueError: adapters are loaded that are not in the weights.
    """
    every = {name: bare(getattr(pipe, name)) for name in pipe._lora_loadable_modules}
    loaded = {name: part for name, part in every.items() if part is not None and adapted(part)}
    if not all(map(fused, loaded.values())):
        raise ValueError(
            "a pipeline folder has no place for adapters: call fuse_lora() to save with them in"
            " the weights, or unload_lora_weights() to save without"
        )
    if not loaded:
        return pipe
    plain = type(pipe)(**{**pipe.components, **copy.deepcopy(loaded)})
    plain.register_to_config(**{key: pipe.config[key] for key in _KEPT})
    plain.unload_lora_weights()
    return plain


def save(pipe: Any, folder: Path, write: Callable[..., None], asked: Mapping[str, Any]) -> None:
    """Makes ``folder`` that of ``pipe`` in one step; what no pipeline's index lists stays there.

    Beyond what ``write``, diffusers' ``save_pretrained``, does older readers, A1111 and ComfyUI
    find their way in it, it loads in float32, and it names no folder of this machine.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a pipeline is saved as a folder")
    if ip_adapters_of(pipe.components.get("unet")):
        raise ValueError(
            "a pipeline folder has no place for an IP-Adapter: call unload_ip_adapter() first"
        )

    def put_in(staging: Path) -> None:
        write(staging, **asked)
        for tower in [name for name in pipe.components if "text_encoder" in name]:
            words = tower.replace("text_encoder", "tokenizer")
            if (network := pipe.components[tower]) is not None:
                save_tokenizer(pipe.components[words], staging / words)
                _text_encoder(network, staging / tower, asked.get("variant"))
        strip_paths(staging)

    replace(folder, put_in, _owned, last=INDEX)


def _text_encoder(text_encoder: Any, folder: Path, variant: str | None) -> None:
    if variant is None:
        shutil.rmtree(folder)  # it may be in several files
        save_text_encoder(bare(text_encoder), folder)
        return
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), "dtype": "float32"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _owned(folder: Path) -> Iterable[str]:
    """Names in ``folder`` that belong to the pipeline in it, if there is one: its index, and the
    parts that the index lists.

    A README, pictures, and a picture tower beside the pipeline are in no index.
    """
    try:
        index = integrity.json_object(folder / INDEX)
    except (OSError, ValueError):  # none, or one that lists nothing
        return [INDEX]
    listed = (name for name, part in index.items() if integrity.is_part(part))
    return [INDEX, *(name for name in listed if name != "classes")]  # of two classes
