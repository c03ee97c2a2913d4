"""``ldm merge OUT --lora A:0.8 --lora B`` and ``ldm extract OUT --base A --tuned B``: LoRAs added
up, put into a model, and taken out of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.failure import check_pipeline, fail, there
from ldm.cli.lora import LoraFormat
from ldm.cli.options import there_are, weighted
from ldm.formats.recognised import INDEX, LORA

_To = Annotated[LoraFormat, typer.Option(help="The format to write.")]


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors, or a folder.")],
    lora: Annotated[
        list[str],
        typer.Option(help="A LoRA, PATH or PATH:WEIGHT; 1 is as trained. May be repeated."),
    ],
    model: Annotated[
        Path | None, typer.Option(help="Pipeline folder: OUT is that model with the LoRAs in it.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the LoRA at most; by default nothing is lost.")
    ] = None,
    to: _To = LoraFormat.diffusers,
) -> None:
    """Adds LoRAs up, into one LoRA or into the weights of a model."""
    asked = [weighted(one) for one in lora]
    there_are([path for path, _ in asked], "lora")
    if model is not None:
        check_pipeline(model, "--model ")
    _check_free(out, model is not None)
    if model is not None and rank is not None:
        fail("--rank is of a LoRA: a model takes the whole update")

    from safetensors import SafetensorError

    from ldm.formats import lora as files
    from ldm.formats.lora_arithmetic import merged

    try:
        if model is None:
            summed, error = merged([(files.read(path), weight) for path, weight in asked], rank)
            _told(summed, error, files.write(summed, out, to.value))
            return
        from ldm.pipeline import LatentDiffusionPipeline

        pipe = LatentDiffusionPipeline.from_pretrained(model)
        names = [f"lora{number}" for number in range(len(asked))]
        for (path, _), name in zip(asked, names, strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
        pipe.set_adapters(names, [weight for _, weight in asked])
        pipe.fuse_lora(adapter_names=names)
        pipe.save_pretrained(out)
        print(out)
    except (ValueError, OSError, SafetensorError) as error:
        fail(error)


def extract(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors, or a folder.")],
    base: Annotated[Path, typer.Option(help="Pipeline folder that the LoRA is for.")],
    tuned: Annotated[Path, typer.Option(help="Pipeline folder that it makes of it.")],
    rank: Annotated[int, typer.Option(min=1, help="Of every layer.")] = 16,
    to: _To = LoraFormat.diffusers,
) -> None:
    """Writes what a model differs in from another as a LoRA, and says how much it misses."""
    check_pipeline(base, "--base ")
    check_pipeline(tuned, "--tuned ")
    _check_free(out, folder=False)

    from safetensors import SafetensorError

    from ldm.formats import lora as files
    from ldm.formats.lora_arithmetic import extracted

    try:
        found, error = extracted(base, tuned, rank)
        _told(found, error, files.write(found, out, to.value))
    except (ValueError, OSError, SafetensorError) as error:
        fail(error)


def _check_free(out: Path, folder: bool) -> None:
    if folder and out.suffix == ".safetensors":
        fail(f"{out}: a model is written as a folder; ldm export makes a file of it")
    target = out / INDEX if folder else out
    if not folder and out.suffix != ".safetensors":
        target = out / LORA
    if there(target):
        fail(f"{target} is there already: remove it, or choose another name")


def _told(lora: Mapping[str, Mapping[str, Any]], error: float, file: Path) -> None:
    print(f"{file}: {sum(map(len, lora.values()))} modules, relative error {error:.3g}")
