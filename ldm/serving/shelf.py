"""Models and LoRAs that requests may name: those of configured folders, and no path.

A LoRA is read when it is first asked for, checked against the model's networks, and stays in them,
switched off, until others have taken its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.formats.recognised import INDEX, LORA, whole
from ldm.serving.network import Adapters

_LOADED = 16  # LoRAs that stay in the networks


class NoSuch(LookupError):
    """Nothing of this name is on the shelf; the message is one line."""


class Shelf:
    """What there is to draw with, by its names.

    Args:
        models: paths by name, the first is drawn with where nothing is named.
        loras: folder of LoRA files, and of folders that hold one as diffusers saves it; None:
            there are none.
    """

    def __init__(self, models: Mapping[str, Path], loras: Path | None = None) -> None:
        self.models, self._loras = dict(models), loras

    def model(self, name: str | None) -> tuple[str, Path]:
        """Name and path of a model; ``NoSuch`` if there is none."""
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            raise NoSuch(f"there is no model {name!r} here: there are {', '.join(self.models)}")
        return name, self.models[name]

    def loras(self) -> dict[str, Path]:
        """Those that lie in the folder now; of a file and a folder of one name the file."""
        if self._loras is None:
            return {}
        folders = {file.parent.name: file for file in self._loras.glob(f"*/{LORA}")}
        files = {file.stem: file for file in self._loras.glob("*.safetensors")}
        return {name: file for name, file in sorted((folders | files).items()) if file.is_file()}

    def lora(self, name: str) -> Path:
        """The file of a LoRA; ``NoSuch`` if there is none."""
        try:
            return self.loras()[name]
        except KeyError:
            raise NoSuch(f"there is no LoRA {name!r} here: see the list of them") from None


def models_of(paths: list[Path], folder: Path | None) -> dict[str, Path]:
    """Models by name: ``paths``, and what ``folder`` holds of pipeline folders and whole models in
    one file.

    Raises:
        ValueError: two have one name.
    """
    found: dict[str, Path] = {}
    inside = sorted(folder.iterdir()) if folder is not None else []
    for path in [*paths, *(p for p in inside if (p / INDEX).is_file() or whole(p))]:
        file = path.suffix == ".safetensors"
        name = path.stem if file else Path(str(path).partition("@")[0]).resolve().name
        if found.setdefault(name, path) != path:
            raise ValueError(f"two models are called {name!r}: {found[name]} and {path}")
    return found


class Adapting:
    """The LoRAs in the networks of one pipeline; a caller has these to itself.

    Args:
        pipe: the pipeline.
        shelf: where files are.
    """

    def __init__(self, pipe: Any, shelf: Shelf) -> None:
        self._pipe, self._shelf = pipe, shelf
        self._in: OrderedDict[str, tuple[str, tuple[int, int]]] = OrderedDict()
        self._count = 0

    def load(self, name: str) -> str:
        """What the networks call the LoRA ``name``, which is read where it is not in them, or its
        file has changed.

        Raises:
            NoSuch: there is none.
            ValueError: it is not for these networks.
        """
        file = self._shelf.lora(name)
        state = file.stat()
        now = state.st_mtime_ns, state.st_size
        if name in self._in and self._in[name][1] != now:
            self._drop(name)
        if name not in self._in:
            inside = f"shelf{self._count}"
            self._count += 1
            try:
                self._pipe.load_lora_weights(file, adapter_name=inside)
            except ValueError as error:  # whose message names the path
                raise ValueError(f"the LoRA {name!r} {_without(str(error), file)}") from None
            self._in[name] = inside, now
        self._in.move_to_end(name)
        return self._in[name][0]

    def __call__(self, adapters: Adapters) -> None:
        """Puts ``adapters`` in force, and no others."""
        inside = [self.load(name) for name, _ in adapters]
        wanted = {name for name, _ in adapters}
        for name in [*self._in]:
            if len(self._in) > _LOADED and name not in wanted:
                self._drop(name)
        if not self._in:
            return
        if inside:
            self._pipe.enable_lora()
            self._pipe.set_adapters(inside, [weight for _, weight in adapters])
        else:
            self._pipe.disable_lora()

    def _drop(self, name: str) -> None:
        self._pipe.delete_adapters(self._in.pop(name)[0])


def _without(message: str, file: Path) -> str:
    """``message`` without the path, which is nobody's business."""
    line = " ".join(message.replace(str(file), "").split())
    return line.lstrip(": ")
