"""Which folders are runs, and what each says of itself: the folder is the only truth."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from typing_extensions import TypedDict

from ldm.config.loader import images
from ldm.errors import ConfigError
from ldm.formats.recognised import INDEX
from ldm.serving.shelf import NoSuch
from ldm.storage.checkpoint import MANIFEST, folders
from ldm.storage.json import JsonError, read_json
from ldm.storage.lock import Holder, holder

State = Literal["alive", "stopped", "finished", "broken"]
SHEET = re.compile(r"images-(\d{1,18})\.png")
_LARGEST = 1 << 20  # bytes of a file that is read whole


class _Counters(TypedDict):
    identity: dict[str, str]


class Run:
    """One run; nothing is kept here that is not in its folder.

    Args:
        folder: of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    @property
    def there(self) -> bool:
        """Whether the folder is that of a run: it has its record, or is held before it has one."""
        record = (self.folder / "config.yaml").is_file() and (
            (self.folder / "environment.json").is_file()
        )
        # A server holds the folder of its pictures, a cached set is held while it is filled.
        return record or (holder(self.folder) is not None and self._bare())

    def _bare(self) -> bool:
        return not any((self.folder / name).exists() for name in ("jobs", "cached.json", "vae"))

    def holder(self) -> Holder | None:
        """The process that trains; its lock dies with it."""
        return holder(self.folder)

    def state(self) -> tuple[State, str]:
        """What becomes of the run, and why it is broken."""
        if self.holder() is not None:
            return "alive", ""
        metrics, fault = _time(self.folder / "metrics.jsonl"), _time(self.folder / "fault.json")
        if fault > metrics:
            return "broken", "a loss or a gradient was no number: fault.json says where"
        try:
            self.config()
        except ValueError as error:
            return "broken", str(error)
        final = _time(self.folder / "final" / MANIFEST)
        newest = max((_time(each / MANIFEST) for each in self.checkpoints()), default=0)
        return ("finished" if final and final >= newest else "stopped"), ""

    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` says; ``ValueError`` with one line where it cannot be read."""
        file = self.folder / "config.yaml"
        try:
            found = _yaml(file, file.stat().st_mtime_ns)
        except FileNotFoundError:
            return {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("config.yaml cannot be read")
        return found

    def settings(self) -> dict[str, str]:
        """The same, flat: every value as JSON by its key, ``optimizer.lr``."""
        return dict(_flat("", self.config()))

    def checkpoints(self) -> list[Path]:
        """Those that are whole by their manifests, the oldest first."""
        return [each for each in folders(self.folder / "checkpoints") if (each / MANIFEST).exists()]

    def results(self) -> dict[str, Path]:
        """Folders of weights by name: checkpoints, and ``final``."""
        final = self.folder / "final"
        found = [*self.checkpoints(), *([final] if (final / MANIFEST).is_file() else [])]
        return {each.name: each for each in found}

    def drawable(self) -> list[str]:
        """Names of those of ``results`` that are pipelines, the newest last."""
        return [name for name, folder in self.results().items() if (folder / INDEX).is_file()]

    def total(self) -> int | None:
        """Images of the whole run; None where it is counted in epochs, and no checkpoint tells."""
        try:
            config = self.config()
            return images(str(config["duration"]), int(config["batch_size"]), None)
        except (ConfigError, ValueError, KeyError, TypeError, ZeroDivisionError):
            pass
        for folder in reversed(self.checkpoints()):
            try:
                told = read_json(folder / "training" / "run.json", _Counters)["identity"]
                return int(told["duration"])
            except (JsonError, OSError, KeyError, ValueError):
                continue
        return None

    def sheets(self) -> list[int]:
        """After how many images there is a sheet of samples."""
        found = (SHEET.fullmatch(name) for name in _names(self.folder / "samples"))
        return sorted(int(name[1]) for name in found if name)

    def sheet(self, after: int) -> Path:
        """The sheet; ``NoSuch`` if there is none."""
        for file in _listed(self.folder / "samples"):
            named = SHEET.fullmatch(file.name)
            if named and int(named[1]) == after and file.is_file() and not file.is_symlink():
                return file
        raise NoSuch("there is no such sheet")

    def log(self, most: int) -> tuple[str, str]:
        """Name and end of the newest log in the folder (``*.log``, ``*.out``, ``*.err``), at most
        ``most`` bytes of whole lines; ("", "") if there is none.
        """
        logs = [
            file
            for file in _listed(self.folder)
            if file.suffix in (".log", ".out", ".err") and file.is_file() and not file.is_symlink()
        ]
        if not logs:
            return "", ""
        newest = max(logs, key=_time)
        with newest.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - most))
            data = opened.read(most)
        if size > most:
            data = data[data.find(b"\n") + 1 :]
        # A bar draws over its own line: what it said last is what stands there.
        lines = data.decode(errors="replace").split("\n")
        return newest.name, "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def runs(root: Path, name: str | None = None) -> Iterator[Run]:
    """The runs in ``root``, by name, or the one of this ``name``; what a link leads to outside of
    the folder is none.
    """
    real = root.resolve()
    for folder in sorted(_listed(root)):
        if name not in (None, folder.name):
            continue
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if folder.is_symlink() and not folder.resolve().is_relative_to(real):
            continue
        run = Run(folder)
        if run.there:
            yield run


def read_some(file: Path) -> bytes:
    """A file that is small; ``OSError`` where it is not."""
    with file.open("rb") as opened:
        data = opened.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise OSError("larger than it can be")
    return data


@lru_cache(maxsize=256)
def _yaml(file: Path, _changed: int) -> Any:
    return yaml.safe_load(read_some(file).decode())


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inside in value.items():
            yield from _flat(f"{key}.{name}" if key else str(name), inside)
    else:
        yield key, json.dumps(value, ensure_ascii=False, default=str)


def _listed(folder: Path) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except OSError:
        return []


def _names(folder: Path) -> list[str]:
    return [file.name for file in _listed(folder)]


def _time(file: Path) -> int:
    """Of the last change, in ns; 0 if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
