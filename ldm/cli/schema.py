"""``ldm schema train``: the JSON schema of a program's configs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Program(StrEnum):
    """Whose configs."""

    train = "train"
    autoencoder = "autoencoder"
    clip = "clip"
    classifier = "classifier"


def schema(
    program: Annotated[
        Program, typer.Argument(metavar="[PROGRAM]", help="train, autoencoder, clip or classifier.")
    ] = Program.train,
) -> None:
    """Prints the JSON schema of a program's configs, for editors."""
    from ldm.config.json_schema import CONFIGS, text

    print(text(CONFIGS[program.value]), end="")
