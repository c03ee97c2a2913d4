"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Steps = Annotated[
    int | None, typer.Option(help="Steps of the sampler; what the folder states, else 30.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 is none; what the folder states, else 7.5.")
]
