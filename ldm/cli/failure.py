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

from ldm.formats.recognised import told, whole

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


def check_pipeline(path: Path, option: str = "", *, file: bool = False) -> None:
    """Ends the command unless ``path``, which ``option`` gave, is a pipeline folder, or where a
    ``file`` will do, a whole model in one.
    """
    try:
        wrong = None if file and whole(path) else told(path)
    except ValueError as error:  # a damaged file
        wrong = str(error)
    except OSError as error:
        wrong = _unlookable(path, error)
    if wrong:
        fail(f"{option}{wrong}")


def at_hand(model: Path, option: str = "", *, file: bool = False) -> Path:
    """The pipeline folder that ``option`` gave: itself, the snapshot of a repository of the Hub, or
    that of a whole model in one file, which is itself where a ``file`` will do.

    What is none of these ends the command.
    """
    from ldm.formats.at_hand import folder_of, of_the_hub

    try:
        one = whole(model)
        if of_the_hub(model) or (one and not file):
            model = folder_of(model)
    except (ValueError, OSError) as error:
        fail(f"{option}{error}")
    check_pipeline(model, option, file=file)
    return model


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
