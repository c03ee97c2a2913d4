"""The command line ``ldm``: one file a command, and ``ldm data`` with commands of its own."""

from __future__ import annotations

import typer

from ldm.cli import data
from ldm.cli.between import between
from ldm.cli.evaluate import HELP, evaluate
from ldm.cli.export import export
from ldm.cli.import_file import import_file
from ldm.cli.lora import convert_lora
from ldm.cli.merge import extract, merge
from ldm.cli.publish import card, push
from ldm.cli.sample import sample
from ldm.cli.schema import schema
from ldm.cli.serve import serve
from ldm.progress import listen
from ldm.threads import wait_asleep

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(data.app, name="data")
app.command()(sample)
app.command()(serve)
app.command()(between)
app.command(help=HELP)(evaluate)
app.command()(export)
app.command("import")(import_file)
app.command()(schema)
app.command("lora")(convert_lora)
app.command()(merge)
app.command()(extract)
app.command()(card)
app.command()(push)


@app.callback()
def main() -> None:
    """Latent text-to-image diffusion."""
    wait_asleep()
    listen("ldm.progress")
