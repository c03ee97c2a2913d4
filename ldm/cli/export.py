"""``ldm export FOLDER --model DIR``: a pipeline folder for others; ``ldm export FILE.safetensors``:
the same in one file.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.failure import check_pipeline, fail, there

_RAW = "training/raw.safetensors"
"""Of a checkpoint."""


class Family(StrEnum):
    """Kinds of single files."""

    auto = "auto"
    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"
    sdxl_refiner = "sdxl-refiner"
    sd3 = "sd3"
    flux = "flux"
    none = "none"


def export(
    out: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.safetensors", help="What to write.")],
    model: Annotated[
        Path | None, typer.Option(help="Pipeline folder in diffusers' layout; required.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Half precision (float16).")] = False,
    family: Annotated[
        Family,
        typer.Option(
            help="Of a file: what A1111 and ComfyUI have to open it as; none: whatever its shape,"
            " for `ldm import`."
        ),
    ] = Family.auto,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw/--ema", help="Of a file, from a checkpoint: weights as in training, or averaged."
        ),
    ] = False,
    prior: Annotated[
        Path | None,
        typer.Option(help="In place of --model, with --decoder: a prior of unCLIP."),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(help="Its decoder: FOLDER is that of both, as Stable unCLIP has it."),
    ] = None,
) -> None:
    """Writes a model without a run's training state, in full or half precision: as a pipeline
    folder, or as one file in the layout that A1111, ComfyUI and diffusers' from_single_file read.

    A folder is written with the picture tower of its CLIP, if there is one that still fits its text
    encoder. A file holds the folder's configs and tokenizer too: `ldm import` makes the folder of
    it again.
    """
    if prior is not None or decoder is not None:
        if model is not None:
            fail("--model is one model, and --prior and --decoder are two: leave it out")
        if prior is None or decoder is None:
            fail("--prior and --decoder belong together: pass both")
        if out.suffix.lower() == ".safetensors" or family is not Family.auto or raw:
            fail("--prior and --decoder make a folder, without --family and --raw")
        check_pipeline(prior, "--prior ")
        check_pipeline(decoder, "--decoder ")
        _both(out, prior, decoder, half)
        return
    if model is None:
        fail("--model is missing: the pipeline folder that is exported")
    check_pipeline(model, "--model ")
    if out.suffix.lower() == ".safetensors":
        _file(out, model, half, family, raw)
    elif family is not Family.auto or raw:
        fail(f"--family and --raw are of a FILE.safetensors, and {out} is a folder")
    else:
        _folder(out, model, half)


def _file(out: Path, model: Path, half: bool, family: Family, raw: bool) -> None:
    if there(out):
        fail(f"{out} is there already: remove it, or choose another name")
    if raw and not (model / _RAW).is_file():
        fail(f"--raw: {model} has no {_RAW}: name a checkpoint of a run, RUN/checkpoints/images-N")

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ldm.formats.single.write import write

    try:
        weights = load_file(model / _RAW) if raw else None
        written = write(model, out, kind=family.value, half=half, raw=weights)
    except (ValueError, OSError, SafetensorError) as error:
        fail(error)
    for note in written.notes:
        print(note)
    print(f"{out}: {written.kind.name}, {out.stat().st_size / 1e6:.1f} MB")


def _folder(out: Path, model: Path, half: bool) -> None:
    _write(out, model, half, lambda pipe, dtype: pipe)


def _both(out: Path, prior: Path, decoder: Path, half: bool) -> None:
    """The folder of a decoder with a prior before it."""

    def joined(pipe: Any, dtype: Any) -> Any:
        from ldm.families import FAMILIES
        from ldm.families.unclip import joined
        from ldm.pipeline import LatentDiffusionPipeline

        before = LatentDiffusionPipeline.from_pretrained(prior, dtype=dtype)
        for option, folder, found, name, what in (
            ("prior", prior, before, "unclip_prior", "prior"),
            ("decoder", decoder, pipe, "unclip", "decoder"),
        ):
            if found.family is not FAMILIES[name]:
                raise ValueError(
                    f"--{option} {folder} is no {what} of unCLIP, but of the family"
                    f" {found.family.name}"
                )
        whole = LatentDiffusionPipeline(**joined(before.components, pipe.components))
        whole.register_to_config(sampling=pipe.config.sampling)
        return whole

    _write(out, decoder, half, joined)


def _write(out: Path, model: Path, half: bool, made: Callable[[Any, Any], Any]) -> None:
    """What is ``made`` of the pipeline in ``model`` and the dtype."""
    if there(out / "model_index.json"):
        fail(f"{out} already holds a pipeline: remove it, or choose another folder")

    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    from ldm.models.clip import Clip, is_beside
    from ldm.pipeline import LatentDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        dtype = torch.float16 if half else torch.float32
        pipe = made(LatentDiffusionPipeline.from_pretrained(model, dtype=dtype), dtype)
        towers = None
        if pipe.image_encoder is None and is_beside(model):  # no part of it, and would be lost
            towers = Clip.load(model / "text_encoder", model / "image_encoder").to(dtype)
        pipe.save_pretrained(out)
        if towers is not None:
            towers.save_vision(out / "image_encoder")
    except (ValueError, OSError, SafetensorError) as error:
        fail(error)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
