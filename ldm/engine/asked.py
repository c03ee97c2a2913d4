"""What somebody asks of a run while it goes on: files in ``RUN/asked``, looked at once a step."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

SAMPLE = Path("asked", "sample")
"""In the run folder: validate at once, and draw the sheet of samples, whatever the step."""


class Asked:
    """The wish for samples; the main process of the run looks for it.

    Args:
        run: the folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / SAMPLE
        self._answered: int | None = None  # time of change of a wish that cannot be removed

    def look(self) -> bool:
        """Whether there is a wish that is not answered yet; it is removed."""
        try:
            asked = self._file.stat().st_mtime_ns
        except OSError:
            return False
        if asked == self._answered:
            return False
        self._answered = asked
        try:
            self._file.unlink()
        except OSError as error:  # somebody else's folder: no reason to end a run
            log.warning("%s cannot be removed: %s", self._file, error.strerror)
        return True
