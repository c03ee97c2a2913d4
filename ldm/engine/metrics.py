"""``metrics.jsonl``: one line per logged step, counted in images."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Metrics:
    """The file of a run; only its main process writes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **values: Any) -> None:
        """Appends one line."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def cut(self, images: int) -> None:
        """Drops lines behind ``images``, where the run goes on: they would stand there twice."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["images"] <= images:
                    kept.append(line + "\n")
            except ValueError:
                log.warning("%s: a line cut short by a kill is dropped", self.file)
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.file)
