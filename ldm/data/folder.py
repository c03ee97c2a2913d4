"""``folder``: the pictures below a folder, with the captions that lie beside them.

Captions come from ``metadata.jsonl`` or ``metadata.csv`` (a row per picture; ``file_name`` is
relative to the file's own folder, a list is several captions) or from a text file beside each
picture: ``cat.txt``, ``cat.caption`` or ``cat.jpg.txt``. Nothing is lost silently: whatever has no
partner is an error in one line, before a run starts. Hidden files and folders are not looked at.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from ldm.data.source import DataError, Example, in_fraction

READABLE = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip
# Pictures that somebody meant to train on, and that would be lost without a word.
_UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")
_SIDECARS = (".txt", ".caption")
_TABLES = ("metadata.jsonl", "metadata.csv")
# Texts that travel with data sets and describe no single picture.
_DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "changelog", "credits")
_LAYOUTS = (
    "metadata.jsonl with file_name and text, or a text file beside each picture "
    "(cat.txt, cat.caption or cat.jpg.txt)"
)


@dataclass(frozen=True)
class FolderData:
    """Captioned pictures below a folder; the config *is* the source.

    A text file is one caption, its lines joined. Several rows for one picture are several captions.

    Args:
        path: the folder; all folders below it are read too.
        caption_column: where the captions are in ``metadata.*``: a text, or a list of texts.
        image_column: where the file names are.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes, so that a copy of a held-out picture is held out as well.
    """

    path: str
    kind: Literal["folder"] = "folder"
    caption_column: str = "text"
    image_column: str = "file_name"
    held_out_fraction: float = 0.05

    @property
    def root(self) -> Path:
        """The folder, ``~`` resolved."""
        return Path(self.path).expanduser()

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """One example per picture in natural order (``2.png`` before ``10.png``).

        Reads the bytes of every picture once, to split by content, and decodes none.

        Raises:
            DataError: anything is missing, empty or without a partner.
        """
        return tuple(
            Example(key, self._captions[key], self._held_out(index))
            for index, key in enumerate(self._keys)
        )

    def load(self, index: int) -> Image.Image:
        """The picture, turned upright as its EXIF says; of an animation the first frame.

        Raises:
            DataError: it cannot be decoded, or has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
        """
        path = self.root / self._keys[index]
        try:
            with Image.open(path) as opened:
                limit, pixels = Image.MAX_IMAGE_PIXELS, opened.width * opened.height
                if limit is not None and pixels > limit:  # Pillow itself only warns up to twice it
                    raise DataError(
                        f"{path}: {opened.width}x{opened.height} pixels are more than the limit of "
                        f"{limit}, scale it down or raise PIL.Image.MAX_IMAGE_PIXELS"
                    )
                opened.load()
                return ImageOps.exif_transpose(opened)
        except DataError:
            raise
        except Exception as error:  # a broken file can make a decoder raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{path}: the picture cannot be read ({reason}), repair or remove it"
            ) from error

    def digest(self, index: int) -> str:
        """SHA-256 of the file's bytes."""
        path = self.root / self._keys[index]
        try:
            state = path.stat()
            return _sha256(path, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path}: the picture cannot be read ({error.strerror})") from error

    def _held_out(self, index: int) -> bool:
        return in_fraction(f"folder {self.digest(index)}", self.held_out_fraction)

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        return tuple(sorted(self._captions, key=_natural))

    @cached_property
    def _captions(self) -> dict[str, tuple[str, ...]]:
        """Captions of every picture by its path below the root, with ``/`` between the parts."""
        files = self._files
        pictures = [key for key in files if key.lower().endswith(READABLE)]
        unreadable = [key for key in files if key.lower().endswith(_UNREADABLE)]
        if unreadable:
            raise self._problem("pictures in a format that is not read", unreadable, "convert them")
        if not pictures:
            raise DataError(
                f"{self.root}: no picture in this folder or below it, "
                f"put {', '.join(READABLE[:5])} ... there with captions as {_LAYOUTS}"
            )
        empty = [key for key in pictures if (self.root / key).stat().st_size == 0]
        if empty:
            raise self._problem("empty picture files", empty, "replace or remove them")
        rows = self._rows(files, set(pictures))
        texts = self._sidecars(files, pictures, orphans_are_documents=bool(rows))
        if not rows and not texts:
            raise DataError(
                f"{self.root}: {len(pictures)} pictures but no captions, write them as {_LAYOUTS}"
            )
        both = [key for key in pictures if key in rows and key in texts]
        if both:
            raise self._problem(
                "pictures with a metadata row and also a text file", both, "keep one of the two"
            )
        captions = rows | texts
        bare = [key for key in pictures if key not in captions]
        if bare:
            raise self._problem("pictures without a caption", bare, "caption or remove them")
        return captions

    @cached_property
    def _files(self) -> tuple[str, ...]:
        """All files that are not hidden, in natural order; links to folders are followed."""
        if not self.root.exists():
            raise DataError(f"{self.root}: this folder does not exist, check data.path")
        if not self.root.is_dir():
            raise DataError(f"{self.root}: this is a file, set data.path to a folder of pictures")

        def refuse(error: OSError) -> None:
            raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})")

        found, seen = [], set()
        for folder, folders, names in os.walk(self.root, onerror=refuse, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link back up
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(n for n in folders if not n.startswith((".", "__MACOSX")))
            below = Path(folder).relative_to(self.root)
            found += [(below / name).as_posix() for name in names if not name.startswith(".")]
        return tuple(sorted(found, key=_natural))

    def _rows(self, files: Sequence[str], pictures: set[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        lost, outside, empty = [], [], []
        for table in files:
            name = Path(table).name
            if name == "metadata.parquet":
                raise DataError(f"{self.root / table}: not read, write it as metadata.jsonl")
            if name not in _TABLES:
                continue
            for line, row in self._table(table):
                where = f"{table}:{line}"
                missing = [c for c in (self.image_column, self.caption_column) if c not in row]
                if missing:
                    raise DataError(
                        f"{self.root / where}: no column {missing[0]!r} among {sorted(row)}, "
                        "set data.image_column or data.caption_column"
                    )
                file_name = row[self.image_column]
                if not isinstance(file_name, str) or not file_name.strip():
                    raise DataError(
                        f"{self.root / where}: {self.image_column!r} is no file name: {file_name!r}"
                    )
                key = os.path.normpath(os.path.join(os.path.dirname(table), file_name.strip()))
                key = Path(key).as_posix()
                captions = _texts(row[self.caption_column])
                if key.startswith("../") or os.path.isabs(file_name):
                    outside.append(f"{where} {file_name}")
                elif key not in pictures:
                    lost.append(f"{where} {file_name}")
                elif captions is None:
                    empty.append(f"{where} {file_name}")
                else:
                    found[key] = found.get(key, ()) + captions
        if outside:
            raise self._problem(
                "rows that point out of the folder", outside, "move the pictures into it"
            )
        if lost:
            raise self._problem("rows without a picture", lost, "add it or remove the row")
        if empty:
            raise self._problem(
                "rows whose caption is empty or no text", empty, "caption or remove them"
            )
        return found

    def _table(self, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line number and columns of every row."""
        text = self._text(table)
        if table.endswith(".csv"):
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            try:
                for row in reader:
                    if None in row:
                        raise DataError(
                            f"{self.root / table}:{reader.line_num}: more columns than the header, "
                            'put captions with a comma into "quotes"'
                        )
                    yield reader.line_num, row
            except csv.Error as error:
                where = f"{self.root / table}:{reader.line_num}"
                raise DataError(f"{where}: not valid CSV ({error})") from None
            return
        # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for ends.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{self.root / table}:{number}: not valid JSON ({error.msg}), "
                    'write one {"file_name": ..., "text": ...} a line'
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{self.root / table}:{number}: not an object, "
                    'write one {"file_name": ..., "text": ...} a line'
                )
            yield number, row

    def _sidecars(
        self, files: Sequence[str], pictures: Sequence[str], orphans_are_documents: bool
    ) -> dict[str, tuple[str, ...]]:
        texts = {key for key in files if key.lower().endswith(_SIDECARS)}
        found: dict[str, tuple[str, ...]] = {}
        used, empty, several = set(), [], []
        for key in pictures:
            stem = key[: -len(Path(key).suffix)]
            mine = [
                base + suffix
                for base in (stem, key)
                for suffix in _SIDECARS
                if base + suffix in texts
            ]
            used.update(mine)
            if len(mine) > 1:
                several.append(" and ".join(mine))
            elif mine:
                caption = " ".join(self._text(mine[0]).split())
                if caption:
                    found[key] = (caption,)
                else:
                    empty.append(mine[0])
        if several:
            raise self._problem("pictures with several caption files", several, "keep one of each")
        if empty:
            raise self._problem("empty caption files", empty, "write or remove them")
        lost = [key for key in sorted(texts - used, key=_natural) if not _is_document(key)]
        if lost and not orphans_are_documents:
            raise self._problem("caption files without a picture", lost, "add it or remove them")
        return found

    def _text(self, key: str) -> str:
        try:
            return (self.root / key).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.root / key}: byte {error.start} is not UTF-8, save the file as UTF-8"
            ) from None
        except OSError as error:
            raise DataError(f"{self.root / key}: cannot be read ({error.strerror})") from None

    def _problem(self, what: str, names: Sequence[str], cure: str) -> DataError:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        shown = "".join(
            c if c.isprintable() else "?" for c in shown
        )  # one line, whatever the names
        return DataError(f"{self.root}: {len(names)} {what}: {shown}; {cure}")


def _texts(value: object) -> tuple[str, ...] | None:
    """The captions of a cell, or None if it or a part of it is empty or no text."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    texts = tuple(" ".join(v.split()) if isinstance(v, str) else "" for v in values)
    return texts if texts and all(texts) else None


def _is_document(key: str) -> bool:
    return Path(key).stem.lower().startswith(_DOCUMENTS)


def _natural(key: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts numbers by value; the key itself breaks ties (``1.png``, ``01.png``)."""
    parts = (part for part in re.split(r"([0-9]+)", key.lower()) if part)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], key


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    # Size and time are there to tell a changed file from the one that was read.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
