"""``ldm sample "a corgi on a red sofa" --model DIR --out corgi.png``."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ldm.cli import edits, story
from ldm.cli import stages as staged
from ldm.cli.failure import at_hand, fail, there
from ldm.cli.options import (
    ComputesIn,
    Dtype,
    Guidance,
    Lora,
    Steps,
    load_loras,
    there_are,
    weighted,
)
from ldm.cli.rows import again, axis, drawn, of_command, swept, worded
from ldm.cli.settings import Row, Settings, calls
from ldm.formats.png import FORMATS, check_room, write_picture
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


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were passed."""
    # By its name: older versions of typer have click beside them, newer ones have it inside.
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def sample(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Pipeline folder in diffusers' layout, a model in one file, or a repository of the"
            " Hub, OWNER/NAME[@REVISION]; required."
        ),
    ] = None,
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
    lora: Lora = None,
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
    mask_crop: edits.MaskCrop = None,
    enlarge: edits.Enlarge = None,
    control: edits.Control = None,
    controlnet: edits.ControlNet = None,
    t2i_adapter: edits.T2IAdapter = None,
    hint: edits.Hint = None,
    ip_adapter: edits.IPAdapter = None,
    ip_image: edits.IPImage = None,
    ip_scale: edits.IPScale = None,
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
        Path | None,
        typer.Option(
            "--prompts",
            help="A text file with one PROMPT a line; or a .jsonl, each line an object of prompt"
            " and settings by the names of options.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A picture that carries its parameters: it is drawn again, but for what is passed"
            " beside.",
        ),
    ] = None,
    wildcards: Annotated[
        Path | None,
        typer.Option(help="A folder: __NAME__ is a line of its NAME.txt, drawn by the seed."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="steps=4,8,16: each prompt with every value and the same seed, on a page beside;"
            " of two, the second goes down.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Tell file, seed, prompt and settings, a line a picture.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: ComputesIn = Dtype.auto,
) -> None:
    """Draws pictures of PROMPTs and saves them as files that carry their parameters."""
    given = _given(context)
    told_of = image, mask, strength, feather, outpaint, variation_seed, variation_strength
    others = control, controlnet
    asides = t2i_adapter, hint, ip_adapter, ip_image, ip_scale
    edit = edits.Edits(*told_of, *(x or () for x in others), mask_crop, *(x or () for x in asides))
    then = then or []
    behind = staged.Behind(len(then), then_guidance or [], noise_level or [], stages)
    behind.check(
        guidance_interval=guidance_interval,
        image=image,
        controlnet=controlnet,
        t2i_adapter=t2i_adapter,
        ip_adapter=ip_adapter,
        enlarge=enlarge,
        variation_seed=variation_seed,
        argument=argument,
        **{"from": picture},
    )
    found = None
    try:
        if picture is not None:
            found = again(picture, out)
            model, edit = found.found(model), found.edits(edit, given)
        elif model is None:
            raise ValueError("--model is missing: the folder of the model that draws")
        common = Settings(
            negative=negative, seed=seed, size=size, steps=steps, guidance=guidance,
            guidance_rescale=guidance_rescale, guidance_interval=guidance_interval,
            sampler=sampler, strength=strength, variation_seed=variation_seed,
            variation_strength=variation_strength, syntax=syntax, argument=tuple(argument or ()),
            enlarge=enlarge,
        ).checked()  # fmt: skip
    except ValueError as error:
        fail(error)
    called = " > ".join(map(_name, (model, *then)))
    model = at_hand(model, "--model ", file=True)
    then = [at_hand(each, "--then ", file=True) for each in then]
    if found is not None and found.model not in (None, called):
        print(f"note: {picture} was drawn by the model {found.model!r}", file=sys.stderr)
    if count < 1:
        fail(f"--count must be at least 1, not {count}")
    if batch < 1:
        fail(f"--batch must be at least 1, not {batch}")
    if sheet is not None and sheet.suffix.lower() != ".png":
        fail(f"--sheet writes a .png, not {sheet}")
    if captions and _is_picture(out):
        fail(f"--captions writes a metadata.jsonl: --out must be a folder, not {out}")
    try:
        rows = of_command(prompts or [], prompt_file, common, found, given)
        said, axes = bool(rows), [axis(one) for one in sweep or []]
        if axes and (count > 1 or wildcards is not None or len(axes) > 2):
            raise ValueError("--sweep is given once or twice, without --count and --wildcards")
        if wildcards is not None and rows:
            rows, count = worded(rows, wildcards, count), 1
        rows = swept(rows or [Row("", common)], axes)
        if axes and sheet is None:
            sheet = (
                out.with_name(f"{out.stem}-sweep.png") if _is_picture(out) else out / "sweep.png"
            )
        for row in rows:
            edit.of(row.settings).check()
            if row.settings.enlarge is not None and edit.image is not None:
                raise ValueError("--enlarge draws anew: leave out --image")
        asked, words = [weighted(one, math.nan) for one in lora or []], embedding or []
        there_are([path for path, _ in asked], "lora")
        there_are(words, "embedding")
        if lora_scale:
            every = _scales([path for path, _ in asked], lora_scale)
            asked = [
                (p, s if math.isnan(own) else own) for (p, own), s in zip(asked, every, strict=True)
            ]
        if found is not None:
            asked, words = found.adapters(asked), found.embeddings(words)
    except ValueError as error:
        fail(error)
    for read_as in {row.settings.syntax: None for row in rows}:
        alike = [row for row in rows if row.settings.syntax == read_as]
        _tell([text for row in alike for text in (row.prompt, row.settings.negative)], read_as)
    loras = [path for path, _ in asked]
    scales = [1.0 if math.isnan(scale) else scale for _, scale in asked]
    used = [(p.resolve().stem, s) for p, s in zip(loras, scales, strict=True)]
    carried = {"loras": used, "words": [path.resolve().stem for path in words]}
    told = {"model": called, "lora": ", ".join(f"{name} {s:g}" for name, s in used) or None}
    if _is_picture(out):
        for row in rows:
            settings = replace(row.settings, steps=row.settings.steps or 1)  # the text has some
            parameters = settings.parameters(row.prompt, **told)
            try:
                check_room(out, parameters, story.beside(settings, parameters, edit, **carried))
            except ValueError as error:
                fail(error)

    # Only now: torch and diffusers take seconds to import, and --help should not.
    import diffusers
    import transformers

    from ldm.cascade import Cascade
    from ldm.engine.precision import device_at_hand
    from ldm.evaluation import sheets
    from ldm.models.rows import paired
    from ldm.pipeline import LatentDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        where = device or str(device_at_hand())
        opened = partial(LatentDiffusionPipeline.from_pretrained, dtype=dtype.on(where))
        pipe = opened(model, **edit.beside())
        if where == "cpu":  # a picture alone is that of ``ldm serve``, to the bit
            pipe = pipe.asking(paired)
        known = inspect.signature(pipe.__call__).parameters.keys()
        for row in rows:
            for name in sorted(row.settings.arguments().keys() & known):
                fail(f"{row.where}--argument {name}: it is not of the model's family, but of all"
                     " drawing")  # fmt: skip
        if not said and pipe.reads is None:
            fail("PROMPT is missing: say what to draw")
        targets = _targets(out, len(rows) * count)
        edit.load(pipe)
        if (note := edit.note(pipe)) and all(row.settings.size is None for row in rows):
            print(f"note: {note}", file=sys.stderr)
        load_loras(pipe, list(zip(loras, scales, strict=True)))
        for word in words:
            pipe.load_textual_inversion(word)
        cascade = None
        if then:
            cascade = Cascade([pipe, *map(opened, then)])
        try:
            (cascade or pipe).to(where)
        except (RuntimeError, AssertionError) as error:  # torch's own words for "not there"
            fail(f"--device {device}: {error}")
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        console, pictures = Console(), []
        through = staged.Through(cascade, behind) if cascade else None
        every = drawn(pipe, calls(rows, count), edit, batch, through)
        for made, target in zip(every, targets, strict=True):
            parameters = made.parameters(**told)
            beside = story.beside(made.settings, parameters, edit, **carried, among=made.company)
            write_picture(made.picture, target, parameters, beside)
            for number, before in enumerate(made.before, 1):
                name = f"{target.stem}-stage{number}{target.suffix}"
                write_picture(before, target.with_name(name), parameters)
            pictures.append(made)
            if captions:
                line = {"file_name": target.name, "text": parameters.prompt}
                with (target.parent / "metadata.jsonl").open("a") as listed:
                    listed.write(json.dumps(line, ensure_ascii=False) + "\n")
            line = json.dumps(story.row_of(made, target), ensure_ascii=False)
            shown = line if as_json else str(target)
            console.print(shown, markup=False, highlight=False, soft_wrap=True)
        if sheet is not None:
            captioned = [row.label or row.prompt for row in rows for _ in range(count)]
            page = sheets.sheet(
                [[made.picture] for made in pictures],
                captioned if any(captioned) else None,
                columns=len(axes[0][1]) if axes else min(len(pictures), 4),
                scale=2 if pictures[0].picture.width <= 128 else 1,
            )
            sheets.save(page, sheet)
            if not as_json:
                console.print(str(sheet), highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        fail(error)
