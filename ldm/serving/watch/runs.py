"""The runs in a folder, for people who watch: looked at and asked."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.engine.asked import SAMPLE
from ldm.serving.shelf import NoSuch, Shelf
from ldm.serving.watch.curves import Curves, X, last
from ldm.serving.watch.errors import Conflict
from ldm.serving.watch.folders import Run, read_some, runs
from ldm.serving.watch.pathless import all_pathless, pathless
from ldm.storage.disk import write_text
from ldm.storage.json import JsonError, parse_json

_OPEN = 4  # runs whose numbers are kept in memory
_LOG = 1 << 14  # bytes of a log
_LAST = (X, "loss", "held_out_loss", "images_per_second")


class Runs:
    """The runs in ``root``; any thread may ask.

    Args:
        root: a folder of run folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._curves: OrderedDict[str, Curves] = OrderedDict()
        self._lock = Lock()

    # -- to look --

    def find(self, name: str) -> Run:
        """The run ``name``; ``NoSuch`` if the folder has none."""
        for run in runs(self.root, name):
            return run
        raise NoSuch("there is no such run")

    def list(self) -> list[dict[str, Any]]:
        """All runs in a few words, the living first, then by their last step."""
        found = [self._short(run) for run in runs(self.root)]
        return sorted(found, key=lambda told: (told["state"] != "alive", -told["changed"]))

    def _short(self, run: Run) -> dict[str, Any]:
        (state, why), file = run.state(), run.folder / "metrics.jsonl"
        numbers, total = last(file, *_LAST), run.total()
        seen, speed = numbers.get(X, 0), numbers.get("images_per_second")
        left = (total - seen) / speed if state == "alive" and total and speed else None
        changed = file if file.exists() else run.folder
        return {
            "name": run.name,
            "state": state,
            "why": pathless(why),
            "images": int(seen),
            "total": total,
            "loss": numbers.get("loss"),
            "held_out_loss": numbers.get("held_out_loss"),
            "images_per_second": speed,
            "seconds_left": left,
            "changed": changed.stat().st_mtime,
        }

    def told(self, name: str) -> dict[str, Any]:
        """All that is told of a run but for its numbers."""
        run = self.find(name)
        file, text = run.log(_LOG)
        held = run.holder()
        return self._short(run) | {
            "sheets": run.sheets(),
            "results": [*run.results()],
            "drawable": run.drawable(),
            "environment": all_pathless(_json(run.folder / "environment.json")),
            "fault": all_pathless(_json(run.folder / "fault.json")),
            "log": {"name": file, "text": pathless(text)},
            "stoppable": held is not None and held.here,
        }

    def curves(self, name: str, points: int, after: str) -> dict[str, Any]:
        """The numbers of a run, see ``Curves.look``."""
        run = self.find(name)
        with self._lock:
            made = self._curves.setdefault(name, Curves(run.folder / "metrics.jsonl"))
            self._curves.move_to_end(name)
            while len(self._curves) > _OPEN:
                self._curves.popitem(last=False)
        return made.look(points, after)

    def sheet(self, name: str, after: int) -> Path:
        """The file of a sheet of samples; ``NoSuch`` if there is none."""
        return self.find(name).sheet(after)

    def config(self, name: str) -> dict[str, str]:
        """The settings of a run, each as JSON."""
        settings = self.find(name).settings()
        return {key: pathless(value) for key, value in settings.items()}

    def differences(self, name: str, other: str) -> list[dict[str, str | None]]:
        """Settings that are not the same in two runs, but for their own folders."""
        here, there = self.find(name).settings(), self.find(other).settings()
        return [
            {"key": key, "here": _shown(here.get(key)), "there": _shown(there.get(key))}
            for key in dict.fromkeys([*here, *there])
            if here.get(key) != there.get(key) and key != "run"
        ]

    def reading(self, folder: Path) -> list[str]:
        """Names of the living runs that read ``folder``, or something in it or around it."""
        found, place = [], folder.resolve()
        for run in runs(self.root):
            held = run.holder()
            if held is None:
                continue
            base = _working(held.process) if held.here else Path.cwd()
            for path in _paths(run.config().get("data")):
                data = (base / Path(path).expanduser()).resolve()
                if data == place or data in place.parents or place in data.parents:
                    found.append(run.name)
                    break
        return found

    # -- to ask --

    def stop(self, name: str) -> None:
        """Asks a run to save and end. Raises ``Conflict`` if it is not alive on this machine."""
        held = self.find(name).holder()
        if held is None:
            raise Conflict("the run is not alive")
        if not held.here:
            raise Conflict("the run is alive on another machine: stop it there")
        os.kill(held.process, signal.SIGTERM)

    def sample(self, name: str) -> None:
        """Asks a run for samples after the step that it is at. Raises ``Conflict`` if it is not
        alive, or has no validation.
        """
        run = self.find(name)
        if run.holder() is None:
            raise Conflict("the run is not alive")
        if not run.config().get("validation"):
            raise Conflict("the config of the run has no validation, which draws the samples")
        write_text(run.folder / SAMPLE, "")

    def draw(self, name: str, result: str | None, shelf: Shelf) -> str:
        """Puts ``result`` of a run, or its newest one, on ``shelf``; returns the model's name.

        Raises:
            NoSuch: there is no such pipeline.
        """
        run = self.find(name)
        known = run.drawable()
        if not known or result not in (None, *known):
            raise NoSuch("the run has no such pipeline: of adapters and words draw with the base")
        chosen = known[-1] if result is None else result
        folder, title = run.results()[chosen], f"{name}@{chosen}"
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise NoSuch("the run has no such pipeline: it is a link out of the folder")
        shelf.models.setdefault(title, folder)
        return title


def _json(file: Path) -> Any:
    """What a file of a run says; None where it is not there, or damaged."""
    try:
        return parse_json(read_some(file))
    except (OSError, JsonError):
        return None


def _shown(value: str | None) -> str | None:
    return None if value is None else pathless(value)


def _paths(data: Any) -> list[str]:
    """Where the sources of a config lie."""
    sources = data if isinstance(data, list) else [data]
    told = [source for source in sources if isinstance(source, dict)]
    keys = ("path", "hints", "reg_path", "dataset_config")
    found = [source.get(key) for source in told for key in keys]
    return [path for path in found if isinstance(path, str)]


def _working(process: int) -> Path:
    """The folder from which a process counts its paths, as far as the system tells."""
    try:
        return Path(os.readlink(f"/proc/{process}/cwd"))
    except OSError:
        return Path.cwd()
