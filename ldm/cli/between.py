"""``ldm between "a cat" "a dog" --model DIR --out x.gif``: pictures from one to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.failure import at_hand, fail, named_sampler, there
from ldm.cli.options import Guidance, Steps
from ldm.cli.settings import Settings
from ldm.progress import Progress

_SEEDS = 2**32


def between(
    first: Annotated[str, typer.Argument(metavar="PROMPT", help="Of the first picture.")],
    model: Annotated[
        Path,
        typer.Option(help="As ldm sample has it: a folder, a file, OWNER/NAME of the Hub."),
    ],
    out: Annotated[
        Path, typer.Option(help="A .gif, there and back; or a folder of numbered .png.")
    ],
    last: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="Of the last picture; left out: the same."),
    ] = None,
    frames: Annotated[int, typer.Option(help="Pictures, with the first and the last.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    to_seed: Annotated[int | None, typer.Option(help="Of the last; left out: the same.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to set out from, for the first.")
    ] = None,
    to_image: Annotated[Path | None, typer.Option(help="The same for the last.")] = None,
    strength: Annotated[float, typer.Option(help="Of --image: 0 to 1.")] = 0.5,
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Annotated[str | None, typer.Option(help="As ldm sample has it.")] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels.")] = None,
    milliseconds: Annotated[int, typer.Option(help="Of a frame of the .gif.")] = 80,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Draws pictures from one to another: between prompts, seeds and pictures."""
    if (image is None) != (to_image is None):
        fail("--image and --to-image belong together: the two pictures")
    if last is None and to_seed is None and to_image is None:
        fail("the last is the first: pass a second PROMPT, --to-seed, or --image and --to-image")
    if image is not None and (last is not None or to_seed is not None):
        fail("--image: from picture to picture there is one PROMPT and one --seed")
    for option, path in (("image", image), ("to-image", to_image)):
        if path is not None and not (there(path, f"--{option} ") and path.is_file()):
            fail(f"--{option} {path}: there is no such file")
    for option, value, least, most in (
        ("frames", frames, 2, 10_000), ("batch", batch, 1, 10_000), ("seed", seed, 0, _SEEDS - 1),
        ("to-seed", seed if to_seed is None else to_seed, 0, _SEEDS - 1),
        ("milliseconds", milliseconds, 10, 60_000), ("strength", strength, 0, 1),
    ):  # fmt: skip
        if not least <= value <= most:
            fail(f"--{option} must lie in {least}..{most}, not {value}")
    animated = out.suffix.lower() == ".gif"
    if not animated and out.suffix and not out.is_dir():
        fail(f"--out {out}: a .gif, or a folder")
    try:
        width, height = Settings(size=size).sides()
    except ValueError as error:
        fail(error)
    sampler = sampler if sampler == "model" else named_sampler(sampler)
    model = at_hand(model, "--model ", file=True)

    # Only now: torch and diffusers take seconds to import, and --help should not.
    import diffusers
    import transformers

    from ldm.data.images import flatten
    from ldm.data.picture import decode
    from ldm.editing.passes import between_pictures, between_prompts, save_gif
    from ldm.engine.precision import device_at_hand
    from ldm.evaluation import sheets
    from ldm.pipeline import LatentDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        pipe.to(device or device_at_hand())
        how = pipe.sampling_defaults.but(
            num_inference_steps=steps, guidance_scale=guidance, sampler=sampler
        )
        call: dict[str, Any] = {
            "num_inference_steps": how.num_inference_steps,
            "guidance_scale": how.guidance_scale,
            "sampler": None if how.sampler == "model" else how.sampler,
            "negative_prompt": negative or None,
            "height": height,
            "width": width,
            "batch_size": batch,
        }
        with (
            Progress("drawing", "pictures", frames) as progress,
            sheets.counted(pipe, progress, frames),
        ):
            if image is None or to_image is None:
                ends = first, first if last is None else last
                seeds = seed, seed if to_seed is None else to_seed
                images = between_prompts(pipe, ends, frames, seeds=seeds, **call).images
            else:
                read = [decode(path.read_bytes(), str(path)) for path in (image, to_image)]
                one, other = (flatten(picture, (255, 255, 255)) for picture in read)
                told = {"strength": strength, "seed": seed, **call}
                images = between_pictures(pipe, first, (one, other), frames, **told).images
        if animated:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_gif(images, out, milliseconds)
            print(out)
        else:
            out.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(images):
                picture.save(out / f"{number:04d}.png")
                print(out / f"{number:04d}.png")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        fail(error)
