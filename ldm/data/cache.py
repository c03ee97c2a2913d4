"""Tensors that cost a network to make, kept by the hash of what they were made from.

An entry's key is content: image bytes + transform + autoencoder weights + dtype for latents;
caption + tokenizer + text encoder weights + dtype for text. A stale entry cannot be used, since its
key differs. The whole of what entries of one kind share is the *space*, a folder; in it lie shards,
safetensors files of stacked rows, each written whole before it gets its name, so that building
stops and goes on at any moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

Rows = Mapping[str, Tensor]


def fingerprint(*parts: object) -> str:
    """Hex SHA-256 over modules (config, names, shapes, bits of weights) and what has a repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(json.dumps(_settings(part), sort_keys=True, default=str).encode())
            for name, value in sorted(part.state_dict().items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a network's config says about its numbers: equal weights can compute differently."""
    config = getattr(module, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    beside = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    return {k: v for k, v in settings.items() if not k.startswith("_") and k not in beside}


class TensorCache:
    """Rows of named tensors under string keys, memory-mapped.

    Args:
        folder: where the spaces lie.
        space: fingerprint of everything but the single entry.
    """

    def __init__(self, folder: Path, space: str) -> None:
        self.folder = folder / space[:32]
        self._place: dict[str, tuple[Path, int]] = {}
        self._columns: dict[Path, dict[str, Tensor]] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._index(shard)

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                keys = json.loads(file.metadata()["keys"])
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read and is made again: %s", shard, error)
            shard.unlink(missing_ok=True)
            return
        for row, key in enumerate(keys):
            self._place[key] = (shard, row)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of one entry, without a batch axis."""
        shard, row = self._place[key]
        if shard not in self._columns:
            with safe_open(shard, "pt") as file:
                self._columns[shard] = {name: file.get_tensor(name) for name in file.keys()}
        return {name: column[row] for name, column in self._columns[shard].items()}

    def build(
        self,
        keys: Sequence[str],
        make: Callable[[Sequence[int]], Rows],
        *,
        what: str,
        batch: int = 64,
        shard_rows: int = 4096,
    ) -> int:
        """Makes what is missing: ``make(indices into keys) -> rows``; returns how many were made.

        A kill loses at most one unfinished shard.
        """
        missing = list({key: i for i, key in enumerate(keys) if key not in self}.values())
        if not missing:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"caching {what}", total=len(missing))
            for first in range(0, len(missing), shard_rows):
                part = missing[first : first + shard_rows]
                chunks = []
                for at in range(0, len(part), batch):
                    rows = make(part[at : at + batch])
                    chunks.append({name: value.cpu() for name, value in rows.items()})
                    progress.advance(bar, len(part[at : at + batch]))
                columns = {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
                self._write([keys[i] for i in part], columns)
        return len(missing)

    def _write(self, keys: list[str], columns: dict[str, Tensor]) -> None:
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24]
        partial = self.folder / f".{name}-{os.getpid()}.partial"
        shard = self.folder / f"{name}.safetensors"
        try:
            save_file(
                {n: c.contiguous() for n, c in columns.items()},
                partial,
                metadata={"keys": json.dumps(keys)},
            )
            partial.replace(shard)
        except BaseException:  # a full disk, or a signal that ends the run
            partial.unlink(missing_ok=True)
            raise
        self._index(shard)
