"""Where what is told while data is looked at goes."""

from __future__ import annotations

import os
from typing import NoReturn

from rich.console import Console

CLOSED = 141
"""Exit status where nobody reads on (``| head``): that of a program which SIGPIPE ends."""


class PipeConsole(Console):
    """A console that ends a program whose reader is gone with ``CLOSED``: rich would end it with 1,
    which of a check means that there are warnings.
    """

    def on_broken_pipe(self) -> NoReturn:
        """Ends the program; what is still to be written goes nowhere."""
        self.quiet = True
        close(self.file.fileno())


def close(descriptor: int) -> NoReturn:
    """Ends the program since nobody reads from ``descriptor``."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    raise SystemExit(CLOSED)
