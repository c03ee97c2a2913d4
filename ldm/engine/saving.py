"""Checkpoints that do not stop the training: copies on the host, which a thread writes and hashes.

One at a time. What goes wrong in the thread is told at the next step, or where the run waits for
it: before the next checkpoint, and at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Thread, current_thread
from types import TracebackType

from ldm.engine.shutdown import Coordinator, at_once
from ldm.storage import checkpoint

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run; a context that ends when the last one is written.

    Args:
        coordinator: what has come up on this process, and the newest checkpoint.
        root: folder of the checkpoints.
        keep: how many stay.
    """

    def __init__(self, coordinator: Coordinator, root: Path, keep: int) -> None:
        self.coordinator, self.root, self.keep = coordinator, root, keep
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        self.coordinator.settled = self._settled
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._join()
        self.coordinator.settled = at_once  # or neither would go, nor the lock of the run
        if error is None:
            self.check()
        elif self._error is not None:  # what ends the run is another error
            log.error("a checkpoint was not written: %s", self._error)

    def write(self, images: int, fill: Callable[[Path], None]) -> None:
        """Writes the checkpoint after ``images``, on the main process; every process calls it.

        Args:
            images: of the run so far.
            fill: puts into the folder it is given what the checkpoint holds.
        """
        self.wait()
        self._write(images, fill)

    def _write(self, images: int, fill: Callable[[Path], None]) -> None:
        name = checkpoint.name_of(images)

        def write() -> None:
            checkpoint.write_folder(self.root / name, fill)
            self.coordinator.saved = self.root / name
            checkpoint.rotate(self.root, self.keep, images)

        self.coordinator.on_main(f"checkpoint {name}", self.root, write)

    def write_later(self, images: int, fill: Callable[[Path], None]) -> None:
        """The same without waiting for it: ``fill`` must not read what the run changes."""
        self.wait()
        if self.coordinator.accelerator.is_main_process:
            self._thread = Thread(target=self._run, args=(images, fill), name="checkpoint")
            self._thread.start()

    def _run(self, images: int, fill: Callable[[Path], None]) -> None:
        try:
            self._write(images, fill)
        except BaseException as error:  # raised where the run looks: in ``check``
            self._error = error

    def check(self) -> None:
        """Raises what went wrong in the thread, unless all processes are about to be told of it."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong meanwhile."""
        self._join()
        self.check()

    def _settled(self) -> None:
        """Returns when what is being written is there, or is not to be; but at once in its own
        thread.
        """
        thread = self._thread
        if thread is not None and thread is not current_thread():
            thread.join()

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
