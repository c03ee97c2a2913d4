"""``ldm import FILE FOLDER``: a model in one file as a pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import check_pipeline, fail, there


def import_file(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Pipeline folder of the same kind, whose configs and tokenizer it takes, and"
            " networks that FILE does not hold. What `ldm export` wrote needs none."
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="Its autoencoder, in place of FILE's: a folder, or a .safetensors."),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="The averaged U-Net, where FILE holds it as well.")
    ] = False,
) -> None:
    """Writes a model in one file, as A1111 and ComfyUI have it, as a pipeline folder."""
    if there(out / "model_index.json"):
        fail(f"{out} already holds a pipeline: remove it, or choose another folder")
    if config is not None:
        check_pipeline(config, "--config ")
    if vae is not None and not there(vae, "--vae "):
        fail(f"--vae {vae}: there is no such file or folder")

    from ldm.formats.single.folder import to_folder
    from ldm.formats.single.read import SingleFile

    try:
        read = SingleFile(source, average=ema)
        to_folder(read, out, config, vae)
    except (ValueError, OSError) as error:
        fail(error)
    if left := read.left():
        print(f"{len(left)} tensors are of no part of the model and were left out, as {left[0]}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
