"""Networks from folders and from random init, and what they are told apart by.

Random init happens inside ``fork_rng`` with a seed of its own per component, so that no part's
weights depend on which others were built before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ldm.diffusion import stream
from ldm.errors import ConfigError
from ldm.formats.integrity import check_network, json_object
from ldm.formats.recognised import told
from ldm.storage.tensor_cache import network_settings

M = TypeVar("M")


@contextmanager
def initialised(seed: int, component: str) -> Iterator[None]:
    """Random init of ``component`` from its own seed; the global generator comes back unmoved."""
    with torch.random.fork_rng():
        torch.manual_seed(int(stream(seed, f"init {component}").integers(2**63)))
        yield


@contextmanager
def described(key: str) -> Iterator[None]:
    """What a network says of numbers that do not fit each other, as an error of the config."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{key}: {message}") from None


def read(cls: type[M], folder: str | Path, key: str, meta: bool) -> M:
    """A network of ``folder`` in float32, or its shape alone; ``ConfigError`` naming ``key``."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no {cls.__name__} (it has no config.json)")
    with described(key):
        config = json_object(folder / "config.json")
    try:
        if not meta or any(folder.glob("*.safetensors")):  # shapes alone need no weights
            check_network(folder, config, pickled=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: the weights in {folder} cannot be read: {error}") from None
    if meta:
        if issubclass(cls, PreTrainedModel):
            return on_meta(lambda: cls(cls.config_class.from_pretrained(folder)))
        return on_meta(lambda: cls.from_config(cls.load_config(folder)))  # type: ignore[attr-defined]
    named = "dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype"
    try:
        network, found = cls.from_pretrained(  # type: ignore[attr-defined]
            folder, use_safetensors=True, output_loading_info=True, **{named: torch.float32}
        )
        if missing := sorted(found["missing_keys"]):  # they would be random, or not there
            raise ValueError(f"they lack {len(missing)} tensors, {missing[0]} for one")
        return network
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{key}: the weights in {folder} cannot be read: {line}") from None


def on_meta(make: Callable[[], M]) -> M:
    """What ``make`` makes, without memory."""
    with torch.device("meta"):
        return make()


def in_model(model: str | None, key: str, subfolder: str) -> Path:
    """The folder of a part that ``key`` does not describe; ``ConfigError`` if no model has it."""
    if model is None:
        raise ConfigError(f"{key} is not described: give {key}, or model, a pipeline folder")
    if Path(model).is_file():
        with described("model"):
            raise ValueError(told(Path(model)))
    if not (Path(model) / "model_index.json").is_file():
        raise ConfigError(f"model: {model} is no pipeline folder (it has no model_index.json)")
    return Path(model) / subfolder


def digest(network: nn.Module, beside: str = "") -> str:
    """Hex SHA-256 of a network's config and weights, and of what belongs to it.

    Every tensor is hashed in a thread of its own: all of a large model's are seconds of work.
    """

    def one(entry: tuple[str, Tensor]) -> bytes:
        name, value = entry
        told = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        told.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return told.digest()

    with ThreadPoolExecutor() as threads:
        every = threads.map(one, sorted(network.state_dict().items()))
        config = json.dumps(network_settings(network), sort_keys=True, default=str) + beside
        return hashlib.sha256(b"".join([config.encode(), *every])).hexdigest()
