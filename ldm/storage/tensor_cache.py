"""Tensors that cost a network to make, kept by the hash of what they were made from.

An entry's key is content: image bytes + transform + autoencoder weights + dtype for latents;
caption + tokenizer + text encoder weights + dtype for text. A stale entry cannot be used, since its
key differs. The whole of what entries of one kind share is the *space*, a folder; in it lie shards,
safetensors files of stacked rows, each written whole before it gets its name, so that building
stops and goes on at any moment, in any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import DataError
from ldm.progress import Progress
from ldm.storage.disk import atomic_write, write_text
from ldm.storage.json import JsonError, read_json
from ldm.storage.shard import KEYS, Shard, ShardError, checksums
from ldm.storage.tensors import write_tensors

log = logging.getLogger(__name__)

Rows = Mapping[str, Tensor]
_SHARD_BYTES = 2**28  # what is kept in memory, and lost by a kill


def fingerprint(*parts: object) -> str:
    """Hex SHA-256 over modules (config, names, shapes, bits of weights) and what has a repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(json.dumps(network_settings(part), sort_keys=True, default=str).encode())
            for name, value in sorted(part.state_dict().items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def network_settings(module: nn.Module) -> dict[str, Any]:
    """What a network's config says about its numbers: equal weights can compute differently."""
    config = getattr(module, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    beside = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    return {k: v for k, v in settings.items() if not k.startswith("_") and k not in beside}


def key_of(*parts: str) -> bytes:
    """The key of an entry: 16 bytes of a hash over what tells it from others of its space."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def column_of(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as a column, S16: a third of what the objects take."""
    return np.fromiter(keys, "S16")


class TensorCache:
    """Rows of named tensors under keys of 16 bytes, read from files when they are asked for.

    Args:
        folder: where the spaces lie.
        space: fingerprint of everything but the single entry.
        whole: nothing is missing and nothing is made: a shard that cannot be read is a
            ``DataError`` that names it. Otherwise it is made again.
    """

    def __init__(self, folder: Path, space: str, *, whole: bool = False) -> None:
        self.folder, self.whole = folder / space[:32], whole
        self._shards: list[Shard] = []
        self._keys, self._places = np.empty(0, "S16"), np.empty(0, np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Takes note of every whole shard, those that other processes wrote included."""
        files = sorted(self.folder.glob("*.safetensors"))
        if files == [shard.file for shard in self._shards]:  # named by what is in them
            return
        self._shards = [shard for file in files if (shard := self._opened(file))]
        keys = [shard.keys for shard in self._shards]
        places = [np.arange(len(k), dtype=np.int64) + (n << 32) for n, k in enumerate(keys)]
        # Sorted by key: 24 bytes an entry, where a dict of Python objects would take 300.
        every = np.concatenate(keys) if keys else np.empty(0, "S16")
        # As two numbers: ten times as fast as texts.
        high, low = every.view(">u8").astype(np.uint64).reshape(-1, 2).T
        order = np.lexsort((low, high))
        self._keys = every[order]
        self._places = np.concatenate(places)[order] if places else np.empty(0, np.int64)

    def _opened(self, file: Path) -> Shard | None:
        try:
            return Shard(file)
        except (ShardError, OSError) as error:
            if self.whole:
                raise self._damaged(file, error) from None
            if isinstance(error, OSError):  # may be whole, and of use to others
                log.warning("%s cannot be read, what is in it is made again: %s", file, error)
            else:
                log.warning("%s is broken and is made again: %s", file, error)
                file.unlink(missing_ok=True)
        return None

    def _damaged(self, file: Path, error: Exception) -> DataError:
        """What is told of a shard that cannot be used any more; unless the cache is whole, what was
        in it counts as missing from now on.
        """
        reason = error.strerror if isinstance(error, OSError) else error
        told = f"{file} cannot be read ({reason})"
        if self.whole:
            return DataError(f"{told}: remove it and start `ldm data cache` again")
        if isinstance(error, ShardError):
            file.unlink(missing_ok=True)
            told += ", and so it was removed"
        return DataError(f"{told}: the same command makes again what was in it")

    def covers(self, what: str) -> bool:
        """Whether ``cover(what)`` was called since, and no shard that was there then is gone."""
        try:
            noted = read_json(self._note(what), list[str])
        except (FileNotFoundError, JsonError):  # there is none, or none that says anything
            return False
        return set(noted) <= {shard.file.name for shard in self._shards}

    def cover(self, what: str) -> None:
        """Keeps in mind that all entries of ``what`` (a hash of it) are there, so that to find that
        out again costs nothing.
        """
        file = self._note(what)
        if file.is_dir():
            log.warning("%s is a folder in the place of a file of the cache: remove it", file)
            return
        write_text(file, json.dumps([shard.file.name for shard in self._shards]))

    def _note(self, what: str) -> Path:
        return self.folder / f"covers-{what[:32]}.json"

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ``_keys`` where ``keys`` (S16, ``b``) would lie, and whether they do."""
        rows = np.searchsorted(self._keys, keys)
        there = rows < len(self._keys)
        there[there] = self._keys[rows[there]] == keys[there]
        return rows, there

    def __contains__(self, key: bytes) -> bool:
        return bool(self._find(column_of([key]))[1][0])

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        """``rows`` of one entry, without a batch axis."""
        return {name: value[0] for name, value in self.rows([key]).items()}

    def rows(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The tensors of some entries, at least one, ``b ...``: each entry is read once, shard by
        shard and in the order of the file.

        Raises:
            DataError: one is not there, or not what was written.
        """
        found, there = self._find(column_of(keys))
        if not there.all():
            raise self._lacking(keys[int(there.argmin())])
        places, first, number = np.unique(
            self._places[found], return_index=True, return_inverse=True
        )
        shards = places >> 32
        into: dict[str, Tensor] = {}
        for n in np.unique(shards).tolist():
            shard, mine = self._shards[n], shards == n
            into = into or shard.empty(len(keys))
            try:
                shard.read((places[mine] & 0xFFFFFFFF).tolist(), into, first[mine].tolist())
            except (ShardError, OSError) as error:
                raise self._damaged(shard.file, error) from None
        again = np.flatnonzero(first[number] != np.arange(len(keys)))
        if len(again):
            to, of = torch.from_numpy(again), torch.from_numpy(first[number[again]])
            for value in into.values():
                value[to] = value[of]
        return into

    def _lacking(self, key: bytes) -> DataError:
        told = f"{self.folder} lacks the entry {key.hex()}, which should be in it"
        if self.whole:
            return DataError(f"{told}: `ldm data cache --verify` finds the file that is damaged")
        for note in self.folder.glob("covers-*.json"):  # one of them was wrong
            if note.is_file():
                note.unlink(missing_ok=True)
        return DataError(f"{told}: the same command looks for what is missing, and makes it")

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of the first of each of ``keys`` (``n``, S16) that is not there."""
        unique, first = np.unique(keys, return_index=True)
        return np.sort(first[~np.isin(unique, self._keys)])

    def build(
        self,
        keys: Sequence[bytes] | np.ndarray,
        make: Callable[[Sequence[int]], Rows],
        *,
        what: str,
        unit: str = "entries",
        batch: int = 64,
        shard_rows: int = 4096,
        rank: int = 0,
        world: int = 1,
    ) -> int:
        """Makes what is missing: ``make(numbers into keys) -> rows``; returns how many it made.

        With several processes each makes its part; ``refresh`` once all are done. A kill loses at
        most one unfinished shard each. ``what`` and the ``unit`` of an entry are shown.
        """
        wanted = np.asarray(keys, "S16")
        missing, size = self.missing(wanted), min(batch, shard_rows)
        # Whose an entry is depends on its number alone: others may be writing already. Batches are
        # those of one process, and so are the bits of what is made.
        mine = missing[missing // size % world == rank].tolist()
        if mine:
            self.folder.mkdir(parents=True, exist_ok=True)
            share = len(mine) / len(missing)
            with Progress(f"caching {what}", unit, len(missing)) as progress:
                numbers, chunks, kept = list[int](), list[dict[str, Tensor]](), 0
                for some in _parts(mine, size):
                    rows = {name: value.cpu() for name, value in make(some).items()}
                    numbers += some
                    chunks.append(rows)
                    kept += sum(value.nbytes for value in rows.values())
                    progress.advance(len(some) / share)  # the others are about as far
                    full = len(numbers) + batch > shard_rows or kept > _SHARD_BYTES
                    if full or numbers[-1] == mine[-1]:
                        columns = {name: torch.cat([c[name] for c in chunks]) for name in rows}
                        self._write(wanted[numbers], columns)
                        numbers, chunks, kept = [], [], 0
            self.refresh()
        return len(mine)

    def _write(self, keys: np.ndarray, columns: dict[str, Tensor]) -> None:
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:24]
        raw = torch.from_numpy(keys.view(np.uint8).reshape(len(keys), 16).copy())
        contents = {n: c.contiguous() for n, c in columns.items()}
        with atomic_write(self.folder / f"{name}.safetensors") as partial:
            write_tensors({KEYS: raw, **contents}, partial, checksums(keys, contents))


def _parts(numbers: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
