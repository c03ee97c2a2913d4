"""The story that a picture carries: what was drawn, by which model, with which settings; and
``ldm sample --from``, which draws it again from that alone.

A picture of a web UI says it by its ``parameters`` text; one of ``ldm sample`` has, beside that
text, whatever the text does not say. Nothing that a picture names is opened: models, LoRAs, words
and pictures are looked for where the command says, by their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm.cli.edits import Edits
from ldm.cli.settings import Company, Drawn, Row, Settings, company, of_parameters
from ldm.formats.png import Parameters, entries, read_beside, read_text
from ldm.formats.recognised import INDEX, LORA, WORD
from ldm.sampling.names import canonical

_LORA = re.compile(r"\s*<lora:([^:<>]+)(?::([^:<>]*))?[^<>]*>")
_READ = {
    "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Lora", "CFG rescale", "CFG interval",
    "Denoising strength", "Variation seed", "Variation seed strength", "Arguments",
}  # fmt: skip
_SILENT = re.compile(r"Version|.*\bhash(es)?|.*\bmodule hashes", re.IGNORECASE)
_USUAL = {("Schedule type", "Automatic"), ("Clip skip", "1"), ("RNG", "CPU")}
_PICTURE_OF = {"controlnet": "control", "t2i_adapter": "hint", "ip_adapter": "ip_image"}
_OF_EVERY = {"prompt", "loras", "words", "edited", "batch"}
"""What stands beside the settings."""


def beside(
    settings: Settings,
    parameters: Parameters,
    edit: Edits,
    *,
    loras: Sequence[tuple[str, float]] = (),
    words: Sequence[str] = (),
    among: Company | None = None,
) -> dict[str, Any]:
    """What it takes to draw a picture again and ``parameters`` do not say.

    Args:
        settings: it was drawn with.
        parameters: of the picture.
        edit: of another picture, if it is one.
        loras: names and weights.
        words: names of the files of textual inversion.
        among: the company that it was drawn in.
    """
    text = Parameters.parse(str(parameters))
    read = asdict(Settings()) | of_parameters(text)
    found = {k: v for k, v in asdict(settings).items() if read[k] != v}
    if text.prompt != parameters.prompt:
        found["prompt"] = parameters.prompt
    if edit.image is not None:
        options = {"image": True, "mask": edit.mask is not None} | {
            "outpaint": edit.outpaint, "feather": edit.feather, "mask_crop": edit.mask_crop
        }  # fmt: skip
        found["edited"] = {
            name: value
            for name, value in options.items()
            if value is not None and value is not False
        }
    followed = {"controlnet": edit.hints, "t2i_adapter": edit.follow, "ip_adapter": edit.ip_images}
    for network, files in followed.items():
        if files:
            asked = {network: True, _PICTURE_OF[network]: True}
            found["edited"] = found.get("edited", {}) | asked
    if edit.ip_scales:
        found["edited"]["ip_scale"] = [*edit.ip_scales]
    every = {"loras": [*map(list, loras)], "words": [*words], "batch": among and [*among]}
    return found | {name: value for name, value in every.items() if value}


@dataclass(frozen=True)
class Story:
    """What a picture says of itself.

    Args:
        where: its file, as messages begin.
        prompt: its text.
        told: settings by their names.
        model: name of the model, if it is said.
        loras: names and weights.
        words: names of files of textual inversion.
        edited: options that it was edited with; {} if it was not.
        company: it was drawn in.
        left: what its file says and nothing here draws.
    """

    where: str
    prompt: str
    told: Mapping[str, Any]
    model: str | None
    loras: tuple[tuple[str, float], ...]
    words: tuple[str, ...]
    edited: Mapping[str, Any]
    company: Company | None
    left: tuple[str, ...]

    def row(self, common: Settings, given: Collection[str], prompt: str | None) -> Row:
        """The picture, but for those settings of ``common`` that are ``given``, and for ``prompt``
        if there is one.

        Raises:
            ValueError: one of its settings is none.
        """
        told = dict(self.told)
        if "image" in given and "mask_crop" not in self.edited:  # whose size it has
            told.pop("size", None)
        try:
            settings = common.but(told)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        passed = {name: value for name, value in asdict(common).items() if name in given}
        settings = replace(settings, **passed)
        same = prompt is None and not {"batch", "count", *asdict(settings)} & {*given}
        own = frozenset({"seed", "variation_seed"})
        return Row(
            self.prompt if prompt is None else prompt,
            settings,
            own,
            company=self.company if same else None,
        )

    def edits(self, edit: Edits, given: Collection[str]) -> Edits:
        """``edit`` with how the picture was edited.

        Raises:
            ValueError: the picture that it was made from is not passed.
        """
        every = ("image", "mask", *(name for pair in _PICTURE_OF.items() for name in pair[::-1]))
        needed = [name for name in every if self.edited.get(name)]
        missing = [name for name in needed if name not in given]
        if missing:
            asked = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"{self.where} is an edited picture and does not hold what it was made from: pass"
                f" {asked}"
            )
        own = {
            name: self.edited[name]
            for name, kind in (("outpaint", str), ("feather", int), ("mask_crop", int))
            if name not in given and type(self.edited.get(name)) is kind
        }
        scales = self.edited.get("ip_scale")
        if "ip_scale" not in given and isinstance(scales, list):
            own["ip_scales"] = [each for each in scales if type(each) in (int, float)]
        return replace(edit, **own)

    def found(self, model: Path | None) -> Path:
        """The model that is passed, by its name if that is a folder of models.

        Raises:
            ValueError: none is passed.
        """
        if model is None:
            named = f"the model {self.model!r}" if self.model else "a model that it does not name"
            raise ValueError(f"{self.where} was drawn by {named}: pass its folder as --model")
        if self.model and _name(self.model) and not (model / INDEX).is_file():
            for inside in (model / self.model, model / f"{self.model}.safetensors"):
                if (inside / INDEX).is_file() or inside.is_file():
                    return inside
        return model

    def adapters(self, passed: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
        """The LoRAs that are ``passed``, those of the picture first, in its order and with its
        weights where none are passed with them (NaN).

        Raises:
            ValueError: one of the picture's is not among them, nor in a folder that is.
        """
        rest, found = list(passed), []
        for name, weight in self.loras:
            for number, (path, own) in enumerate(rest):
                if (file := _called(name, path)) is not None:
                    found.append((file, weight if own != own else own))
                    if file == path:
                        del rest[number]
                    break
            else:
                self._missing("LoRA", name, "lora")
        return found + [(path, own) for path, own in rest if not _shelf(path)]

    def embeddings(self, passed: Sequence[Path]) -> list[Path]:
        """The words that are ``passed``, those of the picture first; ``ValueError`` as
        ``adapters`` has it.
        """
        found = []
        for name in self.words:
            file = next((f for path in passed if (f := _called(name, path)) is not None), None)
            found.append(file or self._missing("word of textual inversion", name, "embedding"))
        return found + [path for path in passed if path not in found and not _shelf(path)]

    def _missing(self, what: str, name: str, option: str) -> Any:
        raise ValueError(
            f"{self.where} was drawn with the {what} {name!r}: pass its file, or the folder that it"
            f" lies in, as --{option}"
        )


def of_picture(file: Path) -> Story:
    """The story that ``file`` carries.

    Raises:
        ValueError: it carries none, or what it says is damaged; the message is one line.
    """
    try:
        text, own = read_text(file), read_beside(file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or 'it is no picture'}") from None
    if text is None:
        raise ValueError(f"{file} carries no parameters: nothing says how it was drawn")
    found, parameters = entries(text), Parameters.parse(text)
    told: dict[str, Any] = of_parameters(parameters)
    where, prompt = str(file), parameters.prompt
    if own is not None:
        try:
            rest = _checked(own)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        told |= {name: value for name, value in own.items() if name not in _OF_EVERY}
        return Story(
            where, own.get("prompt", prompt), told, parameters.model, left=(), **rest
        )  # fmt: skip
    others = {key for key in found if _SILENT.fullmatch(key)}  # no picture of ours has these
    left = [
        f"{key} {value}"
        for key, value in found.items()
        if key not in _READ | others and (key, value) not in _USUAL
    ]
    loras = _named(parameters.lora or "") if not others else []
    if others:
        left.append("the noise of another program")
        told["syntax"] = "a1111"
        loras = [(name, _weight(weight)) for name, weight in _LORA.findall(prompt)]
        prompt = _LORA.sub("", prompt).strip()
    if (sampler := told.get("sampler")) is not None:
        try:
            canonical(sampler)
        except ValueError:
            left.append(f"Sampler {told.pop('sampler')}")
    second = any(key.startswith("Hires") for key in found)
    edited = {"image": True} if "strength" in told and not second else {}
    if second:
        told.pop("strength", None)
    return Story(
        where, prompt, told, parameters.model, tuple(loras), (), edited, None, tuple(left)
    )  # fmt: skip


def row_of(drawn: Drawn, file: Path) -> dict[str, Any]:
    """What ``ldm sample --json`` tells of a picture in ``file``."""
    settings = asdict(drawn.settings)
    seed = settings.pop("seed")
    return {"file": str(file), "seed": seed, "prompt": drawn.prompt, "settings": settings}


def _checked(own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``_OF_EVERY`` as ``Story`` has them; ``ValueError`` if one is none."""
    loras, words, edited = (own.get(name, kind()) for name, kind in
                            (("loras", list), ("words", list), ("edited", dict)))  # fmt: skip
    if not isinstance(own.get("prompt", ""), str):
        raise ValueError("prompt must be a text")
    if not isinstance(edited, dict):
        raise ValueError("edited must be an object")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("words must be names")
    if not isinstance(loras, list) or not all(
        isinstance(one, list) and [*map(type, one)] in ([str, float], [str, int]) for one in loras
    ):
        raise ValueError("loras must be names and weights")
    among = company(own.get("batch"))
    pairs = tuple((name, float(weight)) for name, weight in loras)
    return {"loras": pairs, "words": tuple(words), "edited": edited, "company": among}


def _named(text: str) -> list[tuple[str, float]]:
    """Of "NAME 1, OTHER 0.5"."""
    pairs = (part.rpartition(" ") for part in text.split(", ") if part)
    return [(name, _weight(weight)) for name, _, weight in pairs]


def _weight(text: str) -> float:
    return float(text) if re.fullmatch(r"[+-]?\d*\.?\d+", text) else 1.0


def _name(text: str) -> bool:
    """Whether ``text`` is a name, and no way to somewhere."""
    return Path(text).name == text and text != ".."


def _shelf(path: Path) -> bool:
    """Whether ``path`` is a folder of files by their names, and none of a LoRA or a word."""
    return path.is_dir() and not (path / INDEX).exists() and not any(
        (path / name).is_file() for name in (LORA, WORD)
    )  # fmt: skip


def _called(name: str, path: Path) -> Path | None:
    """``path`` if that is its name, or the file of the name in it; None if there is none."""
    if path.resolve().stem == name:
        return path
    if not _name(name) or not _shelf(path):
        return None
    inside = (path / f"{name}.safetensors", path / name)
    return next((each for each in inside if each.exists()), None)
