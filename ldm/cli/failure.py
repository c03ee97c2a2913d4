"""How a command ends that cannot do what was asked: one line on stderr, status 2; and how one ends
whose output nobody reads any more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from ldm.formats.recognised import told

_SHOWN = 200  # characters of a path that nothing can have


def fail(message: object) -> NoReturn:
    """Prints ``error: message`` as one line and ends the command."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(2)


def named_sampler(name: str | None) -> str | None:
    """``--sampler`` in this library's words; what is no name of one ends the command."""
    from ldm.sampling.names import canonical

    try:
        return name if name in (None, "model") else canonical(name)
    except ValueError as error:
        fail(error)


def check_pipeline(path: Path, option: str = "") -> None:
    """Ends the command unless ``path``, which ``option`` gave, is a pipeline folder."""
    try:
        wrong = told(path)
    except ValueError as error:  # a damaged file
        wrong = str(error)
    except OSError as error:
        wrong = _unlookable(path, error)
    if wrong:
        fail(f"{option}{wrong}")


def there(path: Path, option: str = "") -> bool:
    """Whether there is anything at ``path``, which ``option`` gave; ends the command where nobody
    can look.
    """
    try:
        return path.exists()
    except OSError as error:
        fail(f"{option}{_unlookable(path, error)}")


def _unlookable(path: Path, error: OSError) -> str:
    shown = str(path)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} ..."
    return f"{shown}: it cannot be looked at ({error.strerror}), check the path"


@contextmanager
def piped() -> Iterator[None]:
    """Ends the command with ``ldm.data.console.CLOSED`` where its reader is gone; click would end
    it with 1.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        from ldm.data.console import close

        close(sys.stdout.fileno())
