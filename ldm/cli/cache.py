"""``ldm data cache``: pictures and captions through the frozen networks, ahead of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ldm.cli.failure import fail
from ldm.progress import listen, main_process


def cache(
    config: Annotated[Path, typer.Option(help="YAML file of the run that is to train on it.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the set.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Change keys of the config.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the set instead: every file and every entry.")
    ] = False,
) -> None:
    """Encodes all pictures and captions of a run once, for training without them.

    The set in FOLDER is whole in itself: `data.path=FOLDER` trains on it without the pictures, the
    autoencoder or the text encoder. A second start makes what is missing. In several processes:
    `torchrun --nproc_per_node N -m ldm.cli data cache ...`.

    Exit status: 0 complete, 1 something is wrong under --verify, 2 it could not be made.
    """
    from ldm.config.loader import load
    from ldm.config.schema import TrainConfig
    from ldm.errors import ConfigError, UserError

    first = main_process()
    listen()
    try:
        run = load(TrainConfig, config, overrides or ())
    except ConfigError as error:
        _fail(error, first)

    # Only now: they take seconds to import, and a mistake in a config should not.
    import transformers
    from accelerate import Accelerator
    from safetensors import SafetensorError

    from ldm.tasks.precompute import Precompute
    from ldm.tasks.program import connect

    transformers.utils.logging.disable_progress_bar()
    found: list[str] = []
    try:
        accelerator: Accelerator = connect()
        work = Precompute(run, out, accelerator)
        if verify:
            found = list(work.problems())
        made = not verify and work.build()
        accelerator.end_training()
    except (UserError, OSError, SafetensorError) as error:
        _fail(error, first)
    if not first:
        raise typer.Exit(1 if found else 0)
    for problem in found:
        print(f"{out}: {problem}")
    if found:
        raise typer.Exit(1)
    pictures = work.held.manifest["pictures"]
    told = f"{pictures['train']:,} pictures to train on, {pictures['held_out']:,} held out"
    done = "all of it is as it was made" if verify else "made" if made else "complete already"
    print(f"{out}: {told}; {done}")


def _fail(error: Exception, first: bool) -> NoReturn:
    """Ends every process, of which the first one tells why."""
    from ldm.engine.watch import WATCH

    WATCH.leave("failed")
    if not first:
        raise typer.Exit(2) from None
    fail(error)
