"""``ldm data cache``: pictures and captions through the frozen networks, ahead of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.commands.failure import fail
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
    import transformers
    from accelerate import Accelerator
    from safetensors import SafetensorError

    from ldm.engine.config import load
    from ldm.engine.precompute import Precompute
    from ldm.engine.program import USER_ERRORS, connect
    from ldm.engine.schema import TrainConfig

    first = main_process()
    transformers.utils.logging.disable_progress_bar()
    listen()
    found: list[str] = []
    try:
        run = load(TrainConfig, config, overrides or ())
        accelerator: Accelerator = connect()
        work = Precompute(run, out, accelerator)
        if verify:
            found = list(work.problems())
        made = not verify and work.build()
        accelerator.end_training()
    except (*USER_ERRORS, OSError, SafetensorError) as error:
        if not first:
            raise typer.Exit(2) from None
        fail(error)
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
