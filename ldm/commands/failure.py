"""How a command ends that cannot do what was asked: one line on stderr, status 2."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


def fail(message: object) -> NoReturn:
    """Prints ``error: message`` as one line and ends the command."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(2)
