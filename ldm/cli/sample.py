"""``ldm sample "a corgi on a red sofa" --model DIR --out corgi.png``."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ldm.cli import edits
from ldm.cli import stages as staged
from ldm.cli.failure import at_hand, fail, named_sampler, there
from ldm.cli.options import Guidance, Steps, weighted
from ldm.formats.png import FORMATS, Parameters, check_room, write_picture
from ldm.progress import Progress
from ldm.prompts.files import drawn, lines
from ldm.sampling.names import OF_ANY_PROCESS, SCHEDULED

_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?\d*\.?\d+\s*\)")
_LORA = re.compile(r"<lora:[^<>]*>")


def _targets(out: Path, count: int) -> list[Path]:
    """Where ``count`` pictures go: ``out`` itself if it is a file's name and there is one, else
    numbered.

    In a folder the numbers go on behind those that are there.
    """
    if _is_picture(out):
        if count == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{i:04d}{out.suffix}") for i in range(count)]
    taken = [int(file.stem) for file in out.glob("*.png") if file.stem.isdecimal()]
    first = max(taken, default=-1) + 1
    return [out / f"{first + i:04d}.png" for i in range(count)]


def _is_picture(out: Path) -> bool:
    """Whether --out names a picture, and no folder."""
    folder = there(out, "--out ") and out.is_dir()
    if folder or not (out.is_file() or re.fullmatch(r"\.[A-Za-z]\w*", out.suffix)):
        return False
    if out.suffix.lower() not in FORMATS:
        fail(
            f"--out {out}: pictures are written as {', '.join(FORMATS)}; a folder whose name looks"
            " like a file's has to be there already"
        )
    return True


def _scales(loras: Sequence[Path], scales: Sequence[float]) -> Sequence[float]:
    """As many as there are LoRAs."""
    if len(scales) not in (1, len(loras)):
        fail(
            f"--lora-scale is given {len(scales)} times for {len(loras)} --lora: once, or for each"
        )
    for scale in scales:
        if not math.isfinite(scale):
            fail(f"--lora-scale must be a finite number, not {scale}")
    return scales if len(scales) == len(loras) else list(scales) * len(loras)


def _name(model: Path) -> str:
    """The name of a file, of a folder, or of a repository without its revision."""
    if model.suffix == ".safetensors":
        return model.stem
    return Path(str(model).partition("@")[0]).resolve().name


def _tell(texts: Sequence[str], syntax: str | None) -> None:
    """Tells of what somebody may have meant otherwise than it is read."""
    if syntax is None and (found := next(filter(_WEIGHT.search, texts), None)) is not None:
        told = " ".join(found.split())
        print(f"note: brackets are text in {told!r}: --syntax a1111 reads weights", file=sys.stderr)
    if syntax and (lora := next((m for m in map(_LORA.search, texts) if m), None)):
        fail(f"{lora[0]} in a prompt: pass the file as --lora, and its scale as --lora-scale")


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        fail(f"--guidance-interval must look like -3,3, not {text!r}")
    if not low < high:
        fail(f"--guidance-interval: {low:g} is not less than {high:g}")
    return low, high


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """By name, a number or several."""
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            numbers = [int(part) if part.isdecimal() else float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not name.isidentifier():
            fail(f"--argument must look like NAME=4.5 or NAME=512,512, not {text!r}")
        found[name] = numbers[0] if len(numbers) == 1 else tuple(numbers)
    return found


def sample(
    model: Annotated[
        Path,
        typer.Option(
            help="Pipeline folder in diffusers' layout, a model in one file, or a repository of the"
            " Hub, OWNER/NAME[@REVISION]."
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="One or more texts; names of a model's classes; none of an unconditional model.",
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0 to 1: how far contrast is brought back to that without it.")
    ] = 0.0,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Guide from LOW,HIGH alone, in log(alpha^2 / sigma^2).")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SCHEDULED)}; of any process: {', '.join(OF_ANY_PROCESS)}; or 'model':"
            " the folder's own. What the folder states, else dpm++, or ode-heun of what is not"
            " variance preserving."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture i is drawn from seed + i.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures of every prompt.")] = 1,
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    out: Annotated[
        Path, typer.Option(help="A .png, .jpg or .webp, or a folder for numbered files.")
    ] = Path("sample.png"),
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA of diffusers or kohya: its file or folder, or PATH:WEIGHT. May be"
            " repeated."
        ),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option(help="How much of the LoRA; 1 is as trained. Once, or once for each."),
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(help="A word of textual inversion: its file or folder. May be repeated."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels.")] = None,
    image: edits.Image = None,
    mask: edits.Mask = None,
    strength: edits.Strength = None,
    feather: edits.Feather = None,
    outpaint: edits.Outpaint = None,
    variation_seed: edits.VariationSeed = None,
    variation_strength: edits.VariationStrength = 0.1,
    then: staged.Then = None,
    then_guidance: staged.ThenGuidance = None,
    noise_level: staged.NoiseLevel = None,
    stages: staged.Stages = False,
    argument: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What the model's family is told beside, as its stock pipeline calls it:"
            " true_cfg_scale=4, original_size=512,512. May be repeated.",
        ),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Make --out a data set: add metadata.jsonl.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Also all pictures over their prompts on one page, a .png.")
    ] = None,
    syntax: Annotated[
        str | None,
        typer.Option(
            help="a1111: (word:1.3), [word], BREAK and prompts of any length; else brackets are"
            " text."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with one PROMPT a line.")
    ] = None,
    wildcards: Annotated[
        Path | None,
        typer.Option(help="A folder: __NAME__ is a line of its NAME.txt, drawn by the seed."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Draws pictures of PROMPTs and saves them as files that carry their parameters."""
    width, height = None, None
    if size is not None:
        found = re.fullmatch(r"(\d+)x(\d+)", size)
        if found is None:
            fail(f"--size must look like 512x512, not {size!r}")
        width, height = int(found[1]), int(found[2])
    interval, beside = _interval(guidance_interval), _arguments(argument or [])
    sampler = named_sampler(sampler)
    if not 0 <= guidance_rescale <= 1:
        fail(f"--guidance-rescale must lie in 0..1, not {guidance_rescale}")
    if syntax not in (None, "a1111"):
        fail(f"--syntax is a1111, or left out, not {syntax!r}")
    then = then or []
    called = " > ".join(map(_name, (model, *then)))
    model = at_hand(model, "--model ", file=True)
    then = [at_hand(each, "--then ", file=True) for each in then]
    told_of = image, mask, strength, feather, outpaint, variation_seed, variation_strength
    edit = edits.Edits(*told_of)
    edit.check()
    behind = staged.Behind(len(then), then_guidance or [], noise_level or [], stages)
    behind.check(
        guidance_interval=guidance_interval,
        image=image,
        variation_seed=variation_seed,
        argument=argument,
    )
    if count < 1:
        fail(f"--count must be at least 1, not {count}")
    if sheet is not None and sheet.suffix.lower() != ".png":
        fail(f"--sheet writes a .png, not {sheet}")
    if captions and _is_picture(out):
        fail(f"--captions writes a metadata.jsonl: --out must be a folder, not {out}")
    prompts = list(prompts or [])
    try:
        prompts += lines(prompt_file) if prompt_file is not None else []
        if wildcards is not None and prompts:  # by its own seed, every picture has its own text
            every = [prompt for prompt in prompts for _ in range(count)]
            prompts = [drawn(text, wildcards, seed + i) for i, text in enumerate(every)]
            count = 1
    except ValueError as error:
        fail(error)
    _tell(prompts + [negative], syntax)
    asked, words = [weighted(one, math.nan) for one in lora or []], embedding or []
    loras = [path for path, _ in asked]
    scales = _scales(loras, lora_scale or [1.0])
    scales = [s if math.isnan(own) else own for (_, own), s in zip(asked, scales, strict=True)]
    for option, paths in (("lora", loras), ("embedding", words)):
        for path in paths:
            if not there(path, f"--{option} "):
                fail(f"--{option} {path}: there is no such file or folder")
    used = [f"{p.resolve().stem} {s:g}" for p, s in zip(loras, scales, strict=True)]
    told = partial(
        Parameters,
        negative=negative,
        model=called,
        lora=", ".join(used) or None,
        rescale=guidance_rescale or None,
        interval=guidance_interval,
        arguments=" ".join(argument or []) or None,
    )
    if _is_picture(out):
        for prompt in prompts or [""]:
            try:
                check_room(out, told(prompt))
            except ValueError as error:
                fail(error)

    # Only now: torch and diffusers take seconds to import, and --help should not.
    import diffusers
    import torch
    import transformers

    from ldm.cascade import Cascade
    from ldm.evaluation import sheets
    from ldm.guidance import ClassifierFree
    from ldm.pipeline import LatentDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        for name in sorted(beside.keys() & inspect.signature(pipe.__call__).parameters.keys()):
            fail(f"--argument {name}: it is not of the model's family, but of all drawing")
        if not prompts and pipe.reads is None:
            fail("PROMPT is missing: say what to draw")
        prompts = prompts or [""]
        targets = _targets(out, len(prompts) * count)
        names = [f"lora{number}" for number in range(len(loras))]
        for path, name in zip(loras, names, strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
        if loras:
            pipe.set_adapters(names, list(scales))
        for word in words:
            pipe.load_textual_inversion(word)
        cascade = None
        if then:
            cascade = Cascade([pipe, *map(LatentDiffusionPipeline.from_pretrained, then)])
        try:
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            (cascade or pipe).to(where)
        except (RuntimeError, AssertionError) as error:  # torch's own words for "not there"
            fail(f"--device {device}: {error}")
        given = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
        how = pipe.sampling_defaults.but(**given)
        steps, guidance, sampler = how.num_inference_steps, how.guidance_scale, how.sampler
        guided = {"guidance_scale": guidance, "guidance_rescale": guidance_rescale}
        if interval is not None:
            guided["guidance"] = ClassifierFree(guidance, guidance_rescale, interval)
        total = len(prompts) * count
        call = {"height": height, "width": width, "negative_prompt": negative, "batch_size": batch}
        call |= {"num_images_per_prompt": count, "prompt_syntax": syntax, **edit.call(seed, total)}
        earlier: list[Any] = []
        with Progress("drawing", "pictures", total) as progress, ExitStack() as counting:
            every = cascade.stages if cascade else [pipe]
            for stage in every:
                counting.enter_context(sheets.counted(stage, progress, total / len(every)))
            if cascade:
                call["guidance_rescale"] = guidance_rescale
                images, earlier = behind.draw(cascade, prompts, given, **call)
            else:
                images = pipe(
                    prompts,
                    num_inference_steps=steps,
                    sampler=None if sampler == "model" else sampler,
                    **call,
                    **guided,
                    **beside,
                ).images
        if pipe.reads == ():
            guidance = 1.0  # what the pictures were drawn with: there is nothing to guide by
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        console = Console()
        for i, (made, target) in enumerate(zip(images, targets, strict=True)):
            parameters = told(
                prompts[i // count],
                steps=steps,
                sampler=type(pipe.scheduler).__name__ if sampler == "model" else sampler,
                guidance=guidance,
                width=made.width,
                height=made.height,
                **edit.told(seed, i),
            )
            write_picture(made, target, parameters)
            for number, before in enumerate(earlier, 1):
                name = f"{target.stem}-stage{number}{target.suffix}"
                write_picture(before[i], target.with_name(name), parameters)
            if captions:
                row = {"file_name": target.name, "text": parameters.prompt}
                with (target.parent / "metadata.jsonl").open("a") as rows:
                    rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            console.print(str(target), highlight=False, soft_wrap=True)
        if sheet is not None:
            captioned = [prompt for prompt in prompts for _ in range(count)]
            page = sheets.sheet(
                [[made] for made in images],
                captioned if any(captioned) else None,
                columns=min(len(images), 4),
                scale=2 if images[0].width <= 128 else 1,
            )
            sheets.save(page, sheet)
            console.print(str(sheet), highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        fail(error)
