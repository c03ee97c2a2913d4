"""How a picture was made, inside its file: the ``parameters`` text that Stable Diffusion web UIs
write and read.

    prompt
    Negative prompt: ...
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: .., Model: ..

The format of AUTOMATIC1111's web UI: in a PNG a tEXt chunk in Latin-1, or iTXt in UTF-8 where the
text needs it; in JPEG and WebP the user comment of EXIF, in UTF-16. What that text does not say is
a JSON object of our own beside it: in a PNG the tEXt chunk "ldm", else the maker note of EXIF.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.sampling.names import SCHEDULED

if TYPE_CHECKING:  # the command line imports this, and --help needs no Pillow
    from PIL import Image

_T = TypeVar("_T", int, float)
_KEY = "parameters"
# The tags of EXIF's own table, and in it of the user comment and of what a maker notes for itself.
_EXIF, _COMMENT, _NOTE = 0x8769, 0x9286, 0x927C
_OWN = "ldm"
_MAKER = b"ldm\0"
_NUMBERS = b" " * 200  # of a note, which are not known before the picture is drawn
_UNICODE = b"UNICODE\0"
_SEGMENT = 65_533 - len(b"Exif\0\0")  # bytes that a JPEG has for it
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""By the suffix of a file."""
_NEGATIVE = "Negative prompt: "
_LONGEST: dict[str, Any] = {
    "steps": 1_000_000,
    "sampler": "x" * 40,  # also the name of a scheduler's class
    "guidance": -1.23456e-300,
    "seed": 2**32,
    "width": 16_384,
    "height": 16_384,
    "strength": 1.23456e-5,
    "variation_seed": 2**32,
    "variation_strength": 1.2345678901234567e-300,
}
# A value with a comma, a colon or a line break in it is written as a JSON string.
_ENTRY = re.compile(r'([^:,]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')


@dataclass(frozen=True)
class Parameters:
    """What it takes to draw a picture again.

    Args:
        prompt: the text.
        negative: the negative prompt.
        steps: of the sampler.
        sampler: our name of it where we have one ("euler-a"), else the file's.
        guidance: classifier-free guidance scale.
        seed: of this picture.
        width: pixels.
        height: pixels.
        model: name of the model.
        model_hash: hex digits that identify it.
        lora: name of the LoRA and its scale, "NAME 1"; of several "NAME 1, OTHER 0.5".
        rescale: of classifier-free guidance.
        interval: least and greatest log-SNR that it works at, "-3,3".
        strength: of image to image.
        variation_seed: of noise that the seed's is moved to.
        variation_strength: how far.
        arguments: what the model's family was told beside, "true_cfg_scale=4".

    """

    prompt: str
    negative: str = ""
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    lora: str | None = None
    rescale: float | None = None
    interval: str | None = None
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    arguments: str | None = None

    def __str__(self) -> str:
        """The text in the file."""
        size = f"{self.width}x{self.height}" if self.width and self.height else None
        labels = {name: known.label for name, known in SCHEDULED.items()}
        entries = {
            "Steps": self.steps,
            "Sampler": labels.get(self.sampler or "", self.sampler),
            "CFG scale": None if self.guidance is None else f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": size,
            "Model hash": self.model_hash,
            "Model": self.model,
            "Lora": self.lora,
            "CFG rescale": None if self.rescale is None else f"{self.rescale:g}",
            "CFG interval": self.interval,
            "Denoising strength": None if self.strength is None else f"{self.strength:g}",
            "Variation seed": self.variation_seed,
            "Variation seed strength": self.variation_strength,
            "Arguments": self.arguments,
        }
        listed = [f"{key}: {_quoted(str(v))}" for key, v in entries.items() if v is not None]
        lines = [self.prompt, _NEGATIVE + self.negative if self.negative else "", ", ".join(listed)]
        return "\n".join(line for index, line in enumerate(lines) if line or index == 0)

    @classmethod
    def parse(cls, text: str) -> Parameters:
        """Reads what ``str`` or a web UI wrote; entries that are missing or unknown are skipped."""
        body, found = _parted(text)
        prompt, _, negative = body.partition("\n" + _NEGATIVE)
        ours = {known.label: name for name, known in SCHEDULED.items()}
        sampler = found.get("Sampler")
        width, _, height = found.get("Size", "").partition("x")
        return cls(
            prompt=prompt,
            negative=negative,
            steps=_number(int, found.get("Steps")),
            sampler=ours.get(sampler, sampler) if sampler else None,
            guidance=_number(float, found.get("CFG scale")),
            seed=_number(int, found.get("Seed")),
            width=_number(int, width),
            height=_number(int, height),
            model=found.get("Model"),
            model_hash=found.get("Model hash"),
            lora=found.get("Lora"),
            rescale=_number(float, found.get("CFG rescale")),
            interval=found.get("CFG interval"),
            strength=_number(float, found.get("Denoising strength")),
            variation_seed=_number(int, found.get("Variation seed")),
            variation_strength=_number(float, found.get("Variation seed strength")),
            arguments=found.get("Arguments"),
        )


def entries(text: str) -> dict[str, str]:
    """Everything that the last line of a ``parameters`` text says, by its keys."""
    return _parted(text)[1]


def _parted(text: str) -> tuple[str, dict[str, str]]:
    body, _, last = text.rpartition("\n")
    if not re.match(r"Steps: \d", last):
        return text, {}
    return body, {key.strip(): _unquoted(value) for key, value in _ENTRY.findall(last)}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value


def _number(kind: type[_T], text: str | None) -> _T | None:
    try:
        return kind(text) if text else None
    except ValueError:
        return None


def write_picture(
    image: Image.Image,
    path: str | PathLike[str],
    parameters: Parameters,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Saves ``image`` as a PNG, JPEG or WebP, after the suffix of ``path``, that carries
    ``parameters``, and ``beside`` them what ``read_beside`` finds.

    Raises:
        ValueError: the suffix is another, or the parameters are too long for a JPEG.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: a picture is written as {', '.join(FORMATS)}")
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text(_KEY, str(parameters))
        if beside is not None:
            info.add_text(_OWN, _note(beside).decode())
        image.save(path, format=kind, pnginfo=info)
        return
    note = None if beside is None else _MAKER + _note(beside)
    image.save(path, format=kind, exif=_exif(path, kind, parameters, note), quality=95)


def check_room(
    path: str | PathLike[str], parameters: Parameters, beside: Mapping[str, Any] | None = None
) -> None:
    """Tells before anything is drawn whether ``path`` has room for ``parameters`` and what is
    ``beside`` them; numbers and names that are not known yet count as their longest.

    Raises:
        ValueError: they are too long for a JPEG.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind == "JPEG":
        note = None if beside is None else _MAKER + _note(beside) + _NUMBERS
        _exif(path, kind, replace(parameters, **_LONGEST), note)


def _note(beside: Mapping[str, Any]) -> bytes:
    return json.dumps(beside, separators=(",", ":"), allow_nan=False).encode()


def _exif(
    path: str | PathLike[str], kind: str, parameters: Parameters, note: bytes | None
) -> Image.Exif:
    from PIL import Image

    exif = Image.Exif()
    # UTF-16 as EXIF has its numbers in Pillow; the web UI's own reader tries both orders. Half a
    # character is no text, which is the pipeline's to say.
    own = exif.get_ifd(_EXIF)
    own[_COMMENT] = _UNICODE + str(parameters).encode("utf-16-be", "surrogatepass")
    if note is not None:
        own[_NOTE] = note
    if kind == "JPEG" and len(exif.tobytes()) > _SEGMENT:
        raise ValueError(f"{path}: the prompt is too long for a JPEG: write a .png or .webp")
    return exif


def read_parameters(path: str | PathLike[str]) -> Parameters | None:
    """The parameters of a picture, or None if it carries none."""
    text = read_text(path)
    return None if text is None else Parameters.parse(text)


def read_text(path: str | PathLike[str]) -> str | None:
    """The text of a picture's parameters, or None if it carries none."""
    info, exif = _carried(path)
    text = info.get(_KEY) or _comment(exif.get(_COMMENT))
    return text if isinstance(text, str) else None


def read_beside(path: str | PathLike[str]) -> dict[str, Any] | None:
    """What ``write_picture`` wrote beside the parameters, or None if that was nothing.

    Raises:
        ValueError: it is damaged.
    """
    info, exif = _carried(path)
    note = exif.get(_NOTE)
    own = note.startswith(_MAKER) if isinstance(note, bytes) else False
    text = note[len(_MAKER) :] if own else info.get(_OWN)
    if not isinstance(text, (str, bytes)):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: what {_OWN} wrote into it is damaged")
    return found


def _carried(path: str | PathLike[str]) -> tuple[dict[Any, Any], dict[int, Any]]:
    """What a picture carries, and the table of its EXIF."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # the chunk may stand behind the pixels
            return image.info, image.getexif().get_ifd(_EXIF)
    except (SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: it is no picture: {error}") from None


def _comment(value: object) -> str | None:
    """The text of a user comment, which begins with eight bytes that tell its encoding."""
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else None
    code, text = value[:8], value[8:]
    if code != _UNICODE:
        return text.decode("utf-8", errors="replace").strip("\0 ") or None
    big, little = (text.decode(f"utf-16-{order}", errors="replace") for order in ("be", "le"))
    return little if "Steps: " in little else big  # web UIs write the first, others the second
