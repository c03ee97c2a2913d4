"""The files of a data set that is not downloaded, row by row: pictures, or what is wrong with them.

``datasets`` opens them, on the Hub or here. Of each its rows can be read on from any row, but rows
in front of it are read as well, so a position in a file is not free.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from ldm.data.hub import DatasetsData
from ldm.data.index import Captioned
from ldm.data.metadata import texts
from ldm.data.picture import decode, look
from ldm.data.source import Example, Problem, in_fraction
from ldm.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """One of a stream, as bytes.

    Args:
        example: its key, ``split/FILE:ROW``, and captions.
        data: the picture file.
        digest: SHA-256 of it; where colours were converted or values scaled, of that and how.
        size: width and height, upright, in pixels.
    """

    example: Example
    data: bytes
    digest: bytes
    size: tuple[int, int]


class Block(Captioned):
    """Pictures in memory, as a source.

    Args:
        data: the data set that they are from.
        pictures: what has been read of it.
    """

    problems: Sequence[Problem] = ()
    shards: np.ndarray | None = None

    def __init__(self, data: DatasetsData, pictures: Sequence[Picture]) -> None:
        self.name, self.weight, self.grammar = data.name, data.weight, data.grammar
        self.pictures = pictures
        self.examples = [picture.example for picture in pictures]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, upright, in pixels, int32 ``n 2``."""
        return np.array([picture.size for picture in self.pictures], np.int32).reshape(-1, 2)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Which are held out, bool ``n``."""
        return np.array([example.held_out for example in self.examples], bool)

    def load(self, index: int) -> Image.Image:
        """The picture in sRGB, turned upright as its EXIF says; of an animation the first frame."""
        picture = self.pictures[index]
        return decode(picture.data, f"{self.name} {picture.example.key}")

    def digest(self, index: int) -> str:
        """SHA-256 of the file's bytes; where colours were converted or values scaled, of that and
        how.
        """
        return self.pictures[index].digest.hex()


class Remote:
    """The files of a data set, read row by row.

    Args:
        data: with ``streaming``.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, data: DatasetsData) -> None:
        self.data = data
        self.rows, self.about = data.stream()

    def __len__(self) -> int:
        return self.rows.num_shards

    def read(self, file: int, row: int = 0) -> Iterator[Picture | Problem]:
        """What the rows of ``file`` from ``row`` on are; where it is damaged, one problem for the
        rest.

        Raises:
            DataError: it cannot be reached.
        """
        shard: IterableDataset = self.rows.shard(num_shards=len(self), index=file)
        here = Path(self.data.path).expanduser().is_dir()
        try:
            for cells in shard.skip(row) if row else shard:
                yield self._examined(f"{self.data.split}/{file}:{row + 1}", cells)
                row += 1
        except (pa.ArrowException, OSError, RuntimeError, ValueError) as error:
            # Arrow raises OSErrors as well, which have no number.
            broken = here and isinstance(error, OSError) and error.errno is None
            if broken or isinstance(error, pa.ArrowException):
                log.debug("file %d", file, exc_info=True)
                wrong = "files with a damaged part, of which the rest is lost; write them again"
                yield Problem(f"{self.data.split}/{file}", wrong)
                return
            line = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.data.name}: the stream broke off in file {file} ({line}); the same command"
                " goes on from the last checkpoint"
            ) from error

    def _examined(self, key: str, cells: dict[str, Any]) -> Picture | Problem:
        captions = texts(cells[self.data.caption_column])
        if captions is None:
            return Problem(key, "rows whose caption is empty or no text; caption or remove them")
        cell = cells[self.data.image_column]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            return Problem(
                key, "rows that do not hold the bytes of their picture; leave out data.streaming"
            )
        facts = look(content)
        if facts.problem:
            return Problem(key, facts.problem)
        # The name of all layouts: the same picture is held out in each.
        out = in_fraction(f"folder {facts.digest.hex()}", self.data.held_out_fraction)
        example = Example(key, captions, out)
        return Picture(example, content, facts.digest, (facts.width, facts.height))
