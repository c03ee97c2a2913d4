"""``datasets``: a data set of the package ``datasets``, from the Hub or from a folder.

The pictures stay the bytes that the data set holds (``Image(decode=False)``), so that the same
picture has the same hash in every layout. Its Arrow files are memory-mapped by ``datasets``; rows
are found by number. No code of a data set is run: ``trust_remote_code`` is never passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from ldm.data.captions import Grammar
from ldm.data.index import Indexed, Part, state_of
from ldm.data.rows import Row
from ldm.data.source import DataError
from ldm.data.table import binary, captions_of, picture_of

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_info.json", "state.json")  # what ``Dataset.save_to_disk`` leaves in its folder
SAVED_SPLITS = "dataset_dict.json"  # ``DatasetDict.save_to_disk``


@dataclass(frozen=True)
class DatasetsData(Indexed):
    """A split of a ``datasets`` data set with an image column; the config *is* the source.

    The key of a picture is ``split[row]``.

    Args:
        path: name on the Hub, or a folder that ``save_to_disk`` has written, or that
            ``load_dataset`` understands. With ``HF_HUB_OFFLINE=1`` it must be in the cache.
        config: which configuration of it; None: the only one.
        split: ``train``, ``train[:10%]``; of a folder of ``save_to_disk`` with several, which.
        revision: branch, tag or commit on the Hub; None: the newest.
        image_column: an ``Image`` feature, or the bytes of picture files.
        caption_column: where the captions are: a text, or a list of texts.
        streaming: not there yet.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: what becomes of a caption at every use; None: nothing.
        weight: share of the draws against other sources'; None: its number of pictures.

    Raises:
        ValueError: ``streaming`` is asked for.
    """

    path: str
    kind: Literal["datasets"] = "datasets"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    streaming: bool = False
    held_out_fraction: float = 0.05
    grammar: Grammar | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.streaming:
            raise ValueError(
                "streaming is not there yet: leave it false, the data set is downloaded once and "
                "read from disk"
            )

    @property
    def name(self) -> str:
        """What an error about the whole of it begins with."""
        return self.path

    def where(self, key: str) -> str:
        """The name of the data set, split and row."""
        return f"{self.path} {key}"

    @cached_property
    def parts(self) -> Sequence[Part]:
        """The split as a whole."""
        data = self._dataset
        files = [state_of(Path(file["filename"])) for file in data.cache_files]
        return [
            Part(
                path=self.path,
                settings=" ".join(
                    str(part)
                    for part in (
                        "datasets", self.config, self.split, self.revision, data._fingerprint,
                        self.image_column, self.caption_column,
                    )
                ),
                files=files,
                rows=self._rows,
                read=self._read,
            )
        ]  # fmt: skip

    def _rows(self) -> Iterator[Row]:
        """A row per row of the split; only captions are read."""
        captions = self._dataset.select_columns([self.caption_column]).with_format("arrow")
        number = 0
        for batch in captions.iter(1024):
            for cell in batch.column(0):
                found, wrong = captions_of(cell)
                yield Row(f"{self.split}[{number}]", found, (number, 0, 0), wrong)
                number += 1

    def _read(self, row: Row) -> bytes:
        cell = self._pictures[row.place[0]].column(0)[0].as_py()
        return picture_of(cell, self._folders)

    @cached_property
    def _pictures(self) -> Dataset:
        from datasets import Image

        pictures = self._dataset.select_columns([self.image_column])
        return pictures.cast_column(self.image_column, Image(decode=False)).with_format("arrow")

    @cached_property
    def _folders(self) -> list[Path]:
        """Where rows that hold a path only may lead: the data set, and what was downloaded."""
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        own = [Path(self.path).expanduser()] if Path(self.path).expanduser().is_dir() else []
        return [*own, Path(config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]

    @cached_property
    def _dataset(self) -> Dataset:
        data = self._load()
        for column in (self.image_column, self.caption_column):
            if column not in data.features:
                raise DataError(
                    f"{self.path}: no column {column!r} among {list(data.features)}, "
                    "set data.image_column or data.caption_column"
                )
        feature: Any = data.features[self.image_column]
        if type(feature).__name__ != "Image" and not binary(
            getattr(feature, "pa_type", None) or pa.null()
        ):
            raise DataError(
                f"{self.path}: column {self.image_column!r} holds {feature}, no pictures; "
                "set data.image_column"
            )
        return data

    def _load(self) -> Dataset:
        """Raises ``DataError`` if there is no such data set or split, or no package."""
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self.path}: the package datasets is missing: pip install 'ldm[data]'"
            ) from None
        folder = Path(self.path).expanduser()
        try:
            if all((folder / name).is_file() for name in SAVED):
                return datasets.Dataset.load_from_disk(str(folder))
            if (folder / SAVED_SPLITS).is_file():
                splits = datasets.DatasetDict.load_from_disk(str(folder))
                if self.split not in splits:
                    # The path is put in front of it below, as of every error here.
                    raise DataError(f"no split {self.split!r} among {list(splits)}, set data.split")
                return splits[self.split]
            # A folder that is not there is no name on the Hub: load_dataset says which was meant.
            name = str(folder) if folder.is_dir() else self.path
            return datasets.load_dataset(
                name, self.config, split=self.split, revision=self.revision
            )
        except (
            OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError
        ) as error:  # fmt: skip
            raise DataError(f"{self.path}: {_line(error)}{self._hint()}") from error

    def _hint(self) -> str:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        local = Path(self.path).expanduser().is_dir()
        if local or not HF_HUB_OFFLINE:
            return ""
        return "; HF_HUB_OFFLINE is set, so it must be in the cache: unset it, or check data.path"


def _line(error: Exception) -> str:
    """The error of a package in one line."""
    return " ".join(str(error).split()) or type(error).__name__
