"""``datasets``: a data set of the package ``datasets``, from the Hub or from a folder.

The pictures stay the bytes that the data set holds (``Image(decode=False)``), so that the same
picture has the same hash in every layout. Its Arrow files are memory-mapped by ``datasets``; rows
are found by number. What is streamed is no list of rows: ``ldm.data.stream`` reads it. No code of a
data set is run: ``trust_remote_code`` is never passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import pyarrow as pa

from ldm.data.captions import Grammar
from ldm.data.hints import Hints
from ldm.data.index import Indexed, Part, state_of
from ldm.data.place import AtPath, Place
from ldm.data.ranges import Copies, Count, Share, Weight
from ldm.data.rows import Row
from ldm.data.table import binary, captions_of, of_column, picture_of
from ldm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

T = TypeVar("T")

SAVED = ("dataset_info.json", "state.json")  # what ``Dataset.save_to_disk`` leaves in its folder
SAVED_SPLITS = "dataset_dict.json"  # ``DatasetDict.save_to_disk``


@dataclass(frozen=True)
class Streaming:
    """How a data set is read that is not downloaded first (``ldm.data.readers``).

    Args:
        lanes: places at which it is read at once, each in files of its own; lowered to a divisor of
            the batch size and to the number of files. Every process reads the lanes of its part of
            the batch: a number that the processes divide lets none read what is another's.
        shuffle: pictures of which an order is drawn at a time, over all lanes; their files are in
            memory twice.
    """

    lanes: Copies = 8
    shuffle: Count = 1024

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.shuffle < 1:
            raise ValueError("lanes and shuffle are at least 1")


@dataclass(frozen=True)
class DatasetsData(AtPath, Indexed):
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
        streaming: read it from where it is, again at every pass, instead of downloading it first;
            ``true``, or how. Outside the promise of exact resume.
        held_out_fraction: share of the pictures that is never trained on, chosen by the hash of
            their bytes.
        grammar: what becomes of a caption at every use; None: nothing.
        weight: share of the draws against other sources'; None: its number of pictures.
        hint_column: where the pictures are that a ControlNet learns to follow, as
            ``image_column`` has the others (``conditioning_image``); None: there are none.
    """

    path: str
    kind: Literal["datasets"] = "datasets"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    streaming: Streaming | bool = False
    held_out_fraction: Share = 0.05
    grammar: Grammar | None = None
    weight: Weight | None = None
    hint_column: str | None = None

    precedence: ClassVar[int] = 2

    @classmethod
    def recognises(cls, place: Place) -> str | None:
        """A folder that the package has saved."""
        for files in (SAVED, (SAVED_SPLITS,)):
            if place.folder and all((place.folder / name).is_file() for name in files):
                return f"there is {' and '.join(files)}"
        return None

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

    @cached_property
    def beside(self) -> Hints | None:
        """The hints, if there are some: the same rows with another picture."""
        return of_column(self)

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
        if self.streaming:
            raise DataError(
                f"{self.path}: a stream has no list of its pictures, which is needed here; leave "
                "out data.streaming"
            )
        data = self._load(self._whole)
        self._check(data.features)
        return data

    def stream(self) -> tuple[IterableDataset, str]:
        """Its rows, the picture undecoded; and what tells its files from others, as text.

        Raises:
            DataError: there is no such data set, split or column, or no package.
        """
        data, about = self._load(self._streamed)
        if data.features is None:
            raise DataError(
                f"{self.path}: its files do not say what their columns are, leave out "
                "data.streaming"
            )
        self._check(data.features)
        from datasets import Image

        data = data.select_columns([self.image_column, self.caption_column])
        return data.cast_column(self.image_column, Image(decode=False)), about

    def _check(self, features: Mapping[str, Any]) -> None:
        for column in (self.image_column, self.caption_column):
            if column not in features:
                raise DataError(
                    f"{self.path}: no column {column!r} among {list(features)}, "
                    "set data.image_column or data.caption_column"
                )
        feature: Any = features[self.image_column]
        plain = isinstance(feature, dict) and "bytes" in feature  # parquet that others wrote
        holds = plain or binary(getattr(feature, "pa_type", None) or pa.null())
        if type(feature).__name__ != "Image" and not holds:
            raise DataError(
                f"{self.path}: column {self.image_column!r} holds {feature}, no pictures; "
                "set data.image_column"
            )

    def _load(self, open_: Callable[[], T]) -> T:
        """What ``open_`` returns. Raises ``DataError`` if there is no such data set or split, or no
        package.
        """
        try:
            import datasets.exceptions
        except ImportError:
            raise DataError(
                f"{self.path}: the package datasets is missing: pip install 'ldm[data]'"
            ) from None
        try:
            return open_()
        except (
            OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError
        ) as error:  # fmt: skip
            raise DataError(f"{self.path}: {_line(error)}{self._hint()}") from error

    def _whole(self) -> Dataset:
        import datasets

        folder = Path(self.path).expanduser()
        if all((folder / name).is_file() for name in SAVED):
            return datasets.Dataset.load_from_disk(str(folder))
        if (folder / SAVED_SPLITS).is_file():
            splits = datasets.DatasetDict.load_from_disk(str(folder))
            if self.split not in splits:
                # The path is put in front of it by whoever calls this.
                raise DataError(f"no split {self.split!r} among {list(splits)}, set data.split")
            return splits[self.split]
        return datasets.load_dataset(
            self._where, self.config, split=self.split, revision=self.revision
        )

    def _streamed(self) -> tuple[IterableDataset, str]:
        import datasets

        folder = Path(self.path).expanduser()
        if any((folder / name).is_file() for name in (*SAVED, SAVED_SPLITS)):
            raise DataError("save_to_disk wrote it and it is here, leave out data.streaming")
        builder = datasets.load_dataset_builder(self._where, self.config, revision=self.revision)
        data = builder.as_streaming_dataset(split=self.split)
        files = (builder.config.data_files or {}).get(self.split, ())
        # A commit of the Hub; files of this machine by name and size, since their folder may move.
        about = sorted(
            (Path(file).name, Path(file).stat().st_size) if Path(file).is_file() else (file, 0)
            for file in files
        )
        return data, repr((about, builder.hash if not folder.is_dir() else None))

    @property
    def _where(self) -> str:
        # A folder that is not there is no name on the Hub: load_dataset says which was meant.
        folder = Path(self.path).expanduser()
        return str(folder) if folder.is_dir() else self.path

    def _hint(self) -> str:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        local = Path(self.path).expanduser().is_dir()
        if local or not HF_HUB_OFFLINE:
            return ""
        return "; HF_HUB_OFFLINE is set, so it must be in the cache: unset it, or check data.path"


def _line(error: Exception) -> str:
    """The error of a package in one line."""
    return " ".join(str(error).split()) or type(error).__name__
