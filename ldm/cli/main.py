"""The command line ``ldm``: one file a command, and ``ldm data`` with commands of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ldm.lazy import named
from ldm.progress import listen
from ldm.threads import wait_asleep

COMMANDS = {
    "sample": "ldm.cli.sample:sample",
    "serve": "ldm.cli.serve:serve",
    "between": "ldm.cli.between:between",
    "evaluate": "ldm.cli.evaluate:app",
    "export": "ldm.cli.export:export",
    "import": "ldm.cli.import_file:import_file",
    "schema": "ldm.cli.schema:schema",
    "lora": "ldm.cli.lora:convert_lora",
    "merge": "ldm.cli.merge:merge",
    "extract": "ldm.cli.merge:extract",
    "card": "ldm.cli.publish:card",
    "push": "ldm.cli.publish:push",
    "data": "ldm.cli.data:app",
}
"""Functions and Typers by the names of their commands."""


class Commands(Mapping[str, Any]):
    """Commands, each made when it is first asked for: one need not wait for the others' files."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        """Those that were asked for."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            found = named(COMMANDS[name])
            if not isinstance(found, typer.Typer):
                own = typer.Typer(add_completion=False)
                own.command()(found)
                found = own
            self.made[name] = get_command(found)
            self.made[name].name = name
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    def __init__(self, **told: Any) -> None:
        super().__init__(**told)
        self.commands = Commands()


app = typer.Typer(
    cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)


@app.callback()
def main() -> None:
    """Latent text-to-image diffusion."""
    wait_asleep()
    listen("ldm.progress")
