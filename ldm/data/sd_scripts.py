"""``sd_scripts``: the data sets of sd-scripts as they are: its dataset config, or folders that are
named like ``10_sks dog``, as kohya's interfaces make them.

Every subset becomes a source of its own, with its own grammar, and ``num_repeats`` becomes its
weight: repeats x pictures. (The other way, rows that repeat, would look at and cache a picture once
per repeat, hold out copies of one picture, and could not balance regularisation pictures.) With
weights a subset's share of the draws is exact, and within it all pictures are drawn equally often.

Regularisation pictures (``is_reg``) of a dataset are together drawn as often as its other pictures,
as sd-scripts does by repeating or leaving out some of them; they count in the loss like all others
(``prior_loss_weight`` = 1).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from ldm.data.captions import Grammar
from ldm.data.folder import DOCUMENTS, natural, walk
from ldm.data.index import Indexed, Part, state_of
from ldm.data.metadata import lines_of, read_text
from ldm.data.names import Names, as_stored, composed, of_windows
from ldm.data.picture import READABLE, UNREADABLE, not_read, passed_by
from ldm.data.place import AtPath, Place
from ldm.data.ranges import Copies, Share, Weight
from ldm.data.rows import Row
from ldm.data.sd_scripts_config import Subset, read_metadata, subsets
from ldm.data.source import SourceGroup
from ldm.data.tar import TARS
from ldm.errors import DataError

log = logging.getLogger(__name__)

_SIDECARS = (".txt", ".caption")
_REPEATS = re.compile(r"([1-9][0-9]{0,2}_[^/]+)/[^/]+")
_LISTED = 2  # how rows are told from files: raise it when the same files become other rows


@dataclass(frozen=True)
class SdScriptsData(AtPath, SourceGroup):
    """Data as sd-scripts reads it; a group of sources, one a subset.

    Args:
        path: a dataset config (``.toml`` or ``.json``), or a folder with folders in it that are
            named by repeats and class tokens.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: of all captions, instead of what the config says about its subsets; a folder says
            nothing.
        variants: that of every subset's grammar, see ``Grammar``; with ``grammar``, set it there.
        weight: share of the draws of all subsets together against other sources'; None: their
            pictures times repeats.
        links: follow links that lead out of a folder; off, they are problems.
        reg_path: a folder of regularisation pictures, laid out like a folder ``path``.
    """

    path: str
    kind: Literal["sd_scripts"] = "sd_scripts"
    held_out_fraction: Share = 0.05
    grammar: Grammar | None = None
    variants: Copies = 0
    weight: Weight | None = None
    links: bool = False
    reg_path: str | None = None

    endings: ClassVar[tuple[str, ...]] = (".toml",)
    precedence: ClassVar[int] = 1

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """A TOML, or a folder with nothing but pictures in folders that are named like ``10_sks
        dog`` (no year, no ``01_``).
        """
        if place.folder is None or place.tables or place.ending(".parquet", *TARS):
            return super().recognises(place)
        fits = [_REPEATS.fullmatch(name) for name in place.pictures]
        found = sorted({fit[1] for fit in fits if fit}, key=natural)[:3]
        told = f"all pictures are in folders named by repeats: {', '.join(found)}"
        return told if found and all(fits) else None

    def __post_init__(self) -> None:
        if self.grammar and self.variants:
            raise ValueError("variants stands beside a grammar: set grammar.variants instead")
        if self.variants < 0:
            raise ValueError(f"variants={self.variants}: it cannot be less than 0")

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return str(Path(self.path).expanduser())

    @cached_property
    def sources(self) -> Sequence[SdScriptsSubset]:
        """One source a subset, in order.

        Raises:
            DataError: the config cannot be used, or no folder is named by repeats.
        """
        found = subsets(self.path, self.grammar, self.variants, self.reg_path)
        return [SdScriptsSubset(subset, number, self) for number, subset in enumerate(found)]

    @cached_property
    def weights(self) -> Sequence[float]:
        """Of every subset; looks at all pictures to count those that are trained on."""
        draws = [s.subset.repeats * float((~s.held_out).sum()) for s in self.sources]
        sums: dict[tuple[int, bool], float] = defaultdict(float)
        for source, count in zip(self.sources, draws, strict=True):
            sums[source.subset.dataset, source.subset.is_reg] += count
        for number, source in enumerate(self.sources):
            wanted, there = (sums[source.subset.dataset, reg] for reg in (False, True))
            if source.subset.is_reg and wanted and there:
                draws[number] *= wanted / there
        total = sum(draws)
        if self.weight is not None and total:
            draws = [self.weight * count / total for count in draws]
        return draws


@dataclass(frozen=True)
class SdScriptsSubset(Indexed):
    """The pictures of one folder, or of one metadata file; made by ``SdScriptsData``.

    A folder's captions lie in text files beside its pictures; ``class_tokens`` is that of a picture
    without one. Where wildcards are on, every line of a text is a caption, else the first is.

    Args:
        subset: what is said about it.
        number: its place in ``data``.
        data: the group that it belongs to.
    """

    subset: Subset
    number: int
    data: SdScriptsData = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        """That of its group."""
        return self.data.kind

    @property
    def held_out_fraction(self) -> float:
        """Share of the pictures that is never trained on."""
        return self.data.held_out_fraction

    @property
    def grammar(self) -> Grammar | None:
        """Of its captions."""
        return self.subset.grammar

    @property
    def weight(self) -> float:
        """Share of the draws: repeats x pictures, balanced and scaled by the group."""
        return self.data.weights[self.number]

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return str(self.subset.metadata_file or self.root)

    @property
    def root(self) -> Path:
        """The folder that keys are relative to."""
        if self.subset.image_dir is not None:
            return self.subset.image_dir
        assert self.subset.metadata_file is not None
        return self.subset.metadata_file.parent

    def where(self, key: str) -> str:
        """The path of a picture."""
        return str(self.root / key)

    @cached_property
    def parts(self) -> Sequence[Part]:
        """The folder as a whole, or the metadata file with its pictures."""
        metadata, problems = self.subset.metadata_file, list[Row]()
        if self.subset.image_dir is None:
            files = self._named()
        else:
            files, problems = walk(self.root, self.data.links)
        if metadata is None:  # folders in it are not part of it
            inner = sum("/" in key and key.lower().endswith(READABLE) for key in files)
            files = {key: state for key, state in files.items() if "/" not in key}
            problems = [row for row in problems if "/" not in row.key]
            rows = partial(self._beside, files, problems, inner)
        else:
            rows = partial(self._listed, files, problems)
        states = [(name, *state) for name, state in files.items()]
        said = self.subset
        settings = (metadata, said.extensions, said.class_tokens, self._lines, self.data.links)
        joint = self.grammar.separator if self.grammar else ""
        return [
            Part(
                path=str(self.root.resolve()),
                settings=f"sd_scripts {_LISTED} {settings!r} {joint!r}",
                files=[*states, state_of(metadata)] if metadata else states,
                rows=rows,
                read=self._read,
                reusable=True,
            )
        ]

    @cached_property
    def passed_by(self) -> Counter[str]:
        """How many files of which suffix are neither pictures nor captions."""
        if self.subset.image_dir is None:
            return Counter()
        files, endings = walk(self.root, self.data.links)[0], self.subset.extensions
        inner = self.subset.metadata_file is not None  # else folders in it are not part of it
        mine = (name for name in files if inner or "/" not in name)
        return passed_by((name for name in mine if not name.endswith(endings)), DOCUMENTS)

    @property
    def _lines(self) -> bool:
        return self.grammar is not None and self.grammar.wildcards

    def _read(self, row: Row) -> bytes:
        return (self.root / row.key).read_bytes()

    def _texts(self, text: str) -> tuple[str, ...]:
        """The captions in a text: its lines, or the first of them."""
        return lines_of(text, "each" if self._lines else "first")

    def _beside(
        self, files: dict[str, tuple[int, int]], problems: list[Row], inner: int
    ) -> Iterator[Row]:
        """One row per picture of a folder with text files, then the problems."""
        pictures = _pictures(files)
        if not pictures:
            raise DataError(
                f"{self.root}: no picture in this folder"
                + (f", but {inner} below it: name each folder as a subset" if inner else
                   f", put {', '.join(READABLE[:5])} ... there")
            )  # fmt: skip
        if inner:
            log.warning(
                "%s: %d pictures in folders below it are not read, as in sd-scripts;"
                " name each folder as a subset", self.root, inner,
            )  # fmt: skip
        names, used = Names(files.keys()), set[str]()
        problems += Names(set(pictures)).doubles()
        twice = {row.key for row in problems}
        cut = other = 0
        for key in pictures:
            stem = Path(key).stem
            mine = [n for ending in self.subset.extensions for n in names.find(stem + ending)]
            used.update(mine)
            if key in twice:
                continue
            if len(mine) > 1:
                wrong = f"pictures with several caption files ({' and '.join(mine)}); keep one"
                problems.append(Row(key, (), problem=wrong))
                continue
            if not mine:
                other += any(names.find(stem + ending) for ending in _SIDECARS)
                yield self._row(key, files, *self._without())
                continue
            try:
                text = read_text(self.root / mine[0])
            except DataError as error:
                reason = str(error).removeprefix(f"{self.root / mine[0]}: ")
                wrong = f"pictures whose caption file is unreadable ({reason}); repair it"
                problems.append(Row(key, (), problem=wrong))
                continue
            captions = self._texts(text)
            cut += not self._lines and len(lines_of(text, "each")) > 1
            yield self._row(key, files, captions, "pictures with an empty caption file; write it")
        unread = _unreadable(files)
        beside = (Path(row.key).stem + end for row in unread for end in self.subset.extensions)
        used.update(name for text in beside for name in names.find(text))
        yield from (*unread, *problems)
        for key in sorted(files, key=natural):
            orphan = key.endswith(self.subset.extensions) and key not in used
            if orphan and not Path(key).stem.lower().startswith(DOCUMENTS):
                yield Row(key, (), problem="caption files without a picture; add it or remove them")
        if cut:
            log.warning(
                "%s: of %d caption files with several lines the first is used, as in sd-scripts;"
                " enable_wildcard = true draws one of them", self.root, cut,
            )  # fmt: skip
        if other and self.subset.class_tokens:
            log.warning(
                "%s: %d pictures get class_tokens as their caption, although text files lie beside"
                " them; set caption_extension", self.root, other,
            )  # fmt: skip

    def _without(self) -> tuple[tuple[str, ...], str]:
        """The caption of a picture without a caption file, or what is wrong then."""
        if self.subset.class_tokens:
            return (self.subset.class_tokens,), ""
        endings = " or ".join(self.subset.extensions)
        return (), (
            f"pictures without a {endings} file where there are no class_tokens;"
            " caption them, or set caption_extension or class_tokens"
        )

    def _row(
        self, key: str, files: dict[str, tuple[int, int]], captions: tuple[str, ...], wrong: str
    ) -> Row:
        """A good row if there is a caption; ``wrong`` is the problem if there is none."""
        if captions:
            return Row(key, captions, place=(*files[key], 0))
        return Row(key, (), problem=wrong)

    def _named(self) -> dict[str, tuple[int, int]]:
        """The pictures that a metadata file without image_dir names by their paths."""
        assert self.subset.metadata_file is not None
        found = {}
        for entry in read_metadata(self.subset.metadata_file):
            path = as_stored(Path(self._inside(entry)), self.root)
            key = path.as_posix()
            if key.lower().endswith((*READABLE, *UNREADABLE)) and (self.root / path).is_file():
                found[key] = state_of(self.root / path)[1:]
        return found

    def _listed(self, files: dict[str, tuple[int, int]], problems: list[Row]) -> Iterator[Row]:
        """One row per entry of the metadata file, then the problems."""
        assert self.subset.metadata_file is not None
        pictures = _pictures(files)
        known = Names(set(pictures))
        problems += known.doubles()
        stems: dict[str, list[str]] = defaultdict(list)
        for key in pictures:
            stems[os.path.splitext(composed(key))[0]].append(key)
        unread = _unreadable(files)
        named = {composed(row.key) for row in unread}
        named |= {os.path.splitext(name)[0] for name in named}
        captions: dict[str, tuple[str, ...]] = {}
        twice: set[str] = set()
        for entry, about in read_metadata(self.subset.metadata_file).items():
            key = self._inside(entry)
            fits = known.find(key) or stems.get(composed(key), [])
            if not fits and composed(key) in named:
                continue  # the entry is not to blame
            texts, wrong = self._entry(about)
            if not fits and of_windows(entry):
                wrong = "metadata entries with a path of Windows; name the picture below image_dir"
            elif len(fits) > 1:
                wrong = "metadata entries that fit several pictures; write the file's whole name"
            elif not fits and (key.startswith("../") or Path(key).is_absolute()):
                wrong = "metadata entries that point out of image_dir; move the pictures into it"
            elif not fits:
                wrong = "metadata entries without a picture; add it or remove the entry"
            elif fits[0] in captions:
                twice.add(fits[0])
                wrong = "metadata entries for a picture that has one; keep one of them"
            if wrong:
                problems.append(Row(entry, (), problem=wrong))
            for fit in fits:
                captions.setdefault(fit, () if wrong else texts)
        for key in pictures:
            if key not in captions:
                wrong = "pictures without an entry in metadata_file; add one or move them away"
                problems.append(Row(key, (), problem=wrong))
            elif captions.get(key) and key not in twice:
                yield Row(key, captions[key], place=(*files[key], 0))
        yield from (*unread, *problems)

    def _inside(self, entry: str) -> str:
        """An entry's name as a key: with ``/``, and relative to the folder if it lies there."""
        path = Path(os.path.normpath(entry.strip().replace("\\", "/")))
        for root in (self.root, self.root.resolve()):
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return path.as_posix()

    def _entry(self, about: Any) -> tuple[tuple[str, ...], str]:
        """The captions of a metadata entry, its tags behind each; or what is wrong with it."""
        if not isinstance(about, dict):
            return (), 'metadata entries that are no objects; write {"caption": ..., "tags": ...}'
        caption, tags = (about.get(name) or "" for name in ("caption", "tags"))
        if not isinstance(caption, str) or not isinstance(tags, str):
            return (), "metadata entries whose caption or tags are no text; write them as text"
        mark = self.grammar.separator if self.grammar else ","
        tail = " ".join(tags.split())
        texts = self._texts(caption)
        if tail:
            texts = tuple(f"{text}{mark.rstrip()} {tail}" for text in texts) or (tail,)
        return texts, "" if texts else "metadata entries with neither caption nor tags; write one"


def _pictures(files: dict[str, tuple[int, int]]) -> list[str]:
    """Those that are read, in natural order."""
    return sorted((key for key in files if key.lower().endswith(READABLE)), key=natural)


def _unreadable(files: dict[str, tuple[int, int]]) -> list[Row]:
    unread = (key for key in files if key.lower().endswith(UNREADABLE))
    return [Row(key, (), problem=not_read(key)) for key in unread]
