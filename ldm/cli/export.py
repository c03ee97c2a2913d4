"""``ldm export FOLDER --model DIR``: a pipeline folder for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import check_pipeline, fail, there


def export(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write.")],
    model: Annotated[Path, typer.Option(help="Pipeline folder in diffusers' layout.")],
    half: Annotated[bool, typer.Option("--half", help="Half precision (float16).")] = False,
) -> None:
    """Writes a pipeline folder without a run's training state, in full or half precision.

    With the picture tower of its CLIP, if there is one that still fits its text encoder.
    """
    check_pipeline(model, "--model ")
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
        pipe = LatentDiffusionPipeline.from_pretrained(model, dtype=dtype)
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
