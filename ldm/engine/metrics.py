"""``metrics.jsonl``: one line per logged step, counted in images."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ldm.storage.disk import write_text
from ldm.storage.json import JsonError, parse_json

log = logging.getLogger(__name__)


class _Line(TypedDict):
    images: int


class Metrics:
    """The file of a run; only its main process writes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **values: Any) -> None:
        """Appends one line, or leaves the file as it is and raises ``OSError``."""
        line = (json.dumps(values) + "\n").encode()
        with self.file.open("ab", buffering=0) as stream:
            before = os.fstat(stream.fileno()).st_size
            try:
                if stream.write(line) < len(line):  # a disk that is about to be full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
            except OSError:
                stream.truncate(before)
                raise

    def cut(self, images: int) -> None:
        """Drops lines behind ``images``, where the run goes on: they would stand there twice."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_bytes().splitlines():
            try:
                if parse_json(line, _Line)["images"] <= images:
                    kept.append(line.decode() + "\n")
            except JsonError:
                log.warning("%s: a line cut short by a kill is dropped", self.file)
        write_text(self.file, "".join(kept))
