"""``ldm evaluate DIR``: what a model draws for fixed captions, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ldm.cli import stages as staged
from ldm.cli.failure import at_hand, fail, named_sampler
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
from ldm.config.suites import SUITES, that_need, without_text

if TYPE_CHECKING:
    from ldm.cascade import Cascade
    from ldm.data.items import Items
    from ldm.evaluation.report import Drawing
    from ldm.evaluation.suites import Report


Suite = StrEnum("Suite", {name.replace("-", "_"): name for name in SUITES})
HELP = "\n\n".join(
    [
        "Measures what the model in DIR draws for fixed captions, with 95 % intervals.",
        "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()) + ".",
    ]
)
"""Of ``evaluate``."""
Bounds = StrEnum("Bounds", ["none", "static", "dynamic"])
_SWEPT: dict[str, Any] = {
    "steps": int, "guidance": float, "noise-level": int, "sampler": named_sampler,
    "threshold": lambda word: Bounds(word).value,
}  # fmt: skip


def _sweep(text: str | None) -> tuple[str, list[Any]]:
    if text is None:
        return "", [None]
    name, equals, values = text.partition("=")
    if name not in _SWEPT or not equals:
        fail(
            f"--sweep {text!r}: write steps=4,8,16,50 or guidance=1,2,3,5, or the like of"
            f" {', '.join(list(_SWEPT)[2:])}"
        )
    try:
        return name.replace("-", "_"), [_SWEPT[name](value) for value in values.split(",")]
    except ValueError:
        of = "none, static, dynamic" if name == "threshold" else "numbers"
        fail(f"--sweep {text!r}: the values must be {of}")


def _asked(chosen: list[Suite] | None, data: str | None, prompts: Path) -> list[Suite]:
    """The suites to measure; those that were not chosen only where there is what they need."""
    compare = that_need("pictures")
    if chosen is None:
        absent = compare if data is None else set[str]()
        absent |= set() if prompts.is_dir() else that_need("lists")
        return [each for each in Suite if each in that_need("text") - absent]
    comparing = compare & {*chosen}
    if data is not None and not comparing:
        names = sorted(compare)
        fail(f"--data is what {' and '.join(names)} compares with: add --suite {names[0]}")
    if data is None and comparing:
        fail(
            f"--suite {min(comparing)} compares with captioned pictures: add --data FOLDER"
            " (or emoji, shapes, digits)"
        )
    return chosen


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Pipeline folder.")],
    lora: Lora = None,
    then: staged.Then = None,
    then_guidance: staged.ThenGuidance = None,
    noise_level: staged.NoiseLevel = None,
    suite: Annotated[
        list[Suite] | None,
        typer.Option(
            help="What to measure; may be repeated. By default all made of captions, quality only"
            " with --data."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Captions of each suite; its own number by default.")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="Space of features: pixels, pixels:SIDE, clip:FOLDER, inception, folder:FOLDER;"
            " may be repeated. The first clip: gives CLIP scores. pixels:16, and the model's own"
            " picture tower if it has one."
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="Named sampler; what the folder states, else dpm++ or ode-heun."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="steps=4,8,16,50, guidance=1,2,3,5, sampler=ddim,dpm++, threshold=static,dynamic"
            " or noise-level=0,200: one column each."
        ),
    ] = None,
    threshold: Annotated[
        Bounds | None,
        typer.Option(help="How x0 of a model of pixels is kept within bounds; as it states."),
    ] = None,
    prompts: Annotated[
        Path, typer.Option(help="Folder of the prompt lists, NAME.txt, one prompt a line.")
    ] = Path("assets/prompts"),
    data: Annotated[
        str | None,
        typer.Option(
            help="Captioned pictures that quality draws and compares with: a path as data.path of a"
            " run, or emoji, shapes, digits, or '{kind: KIND, ...}' as data of a run."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture i is drawn from seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 64,
    out: Annotated[
        Path, typer.Option(help="Folder for figures.json, table.md, sheets and charts.")
    ] = Path("runs/evaluation"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: ComputesIn = Dtype.auto,
) -> None:
    """Measures what the model in DIR draws for fixed captions, with 95 % intervals."""
    name, values = _sweep(sweep)
    sampler = named_sampler(sampler) if sampler else None
    then = then or []
    behind = staged.Behind(len(then), then_guidance or [], noise_level or [], stages=False)
    behind.check()
    if name == "noise_level" and not then:
        fail("--sweep noise-level is of --then, of which there is none")
    model, *then = [at_hand(model), *(at_hand(each, "--then ") for each in then)]
    if count is not None and count < 8:
        fail(f"--count must be at least 8, not {count}")
    loras = [weighted(one) for one in lora or []]
    there_are([path for path, _ in loras], "lora")
    asked = _asked(suite, data, prompts)
    if then and (alone := sorted(that_need("noise") & {*asked})):
        if suite is not None:
            fail(f"--suite {alone[0]} measures one network: leave out --then")
        asked = [each for each in asked if each not in alone]

    # Only now: torch and diffusers take seconds to import, and --help should not.
    import diffusers
    import transformers

    from ldm.cascade import Cascade
    from ldm.config.provenance import environment
    from ldm.engine.precision import device_at_hand
    from ldm.evaluation import charts, features
    from ldm.evaluation.report import Drawing, heads, rows, show, write
    from ldm.evaluation.runner import Evaluator, References, draw_with
    from ldm.evaluation.suites import Spent
    from ldm.families.noise import saved
    from ldm.pipeline import LatentDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    reports: dict[str, list[Report]] = {}
    try:
        if name and not charts.available():
            fail("--sweep draws charts by matplotlib: pip install 'ldm[evaluate]'")
        device = device or str(device_at_hand())
        own = f"clip:{model}" if (model / "image_encoder" / "config.json").is_file() else None
        named = space or ["pixels:16", *([own] if own else [])]
        compares = that_need("spaces") & {*asked}
        spaces = [features.space(spec, device) for spec in named] if compares else []
        opened = partial(LatentDiffusionPipeline.from_pretrained, dtype=dtype.on(device))
        pipe, *_ = pipes = [opened(each) for each in (model, *then)]
        load_loras(pipe, loras)
        row = Cascade(pipes) if then else None
        for each in pipes:
            each.to(device)
        if (threshold or name == "threshold") and any(p.codec.network is not None for p in pipes):
            fail("--threshold: latents have no bounds: it is of models of pixels")
        if pipe.reads is not None and (unread := [s for s in asked if s in that_need("text")]):
            told = f"--suite {unread[0]}: this model reads no text; measure it by"
            fail(f"{told} {' or '.join(without_text())}")
        how = pipe.sampling_defaults.but(
            num_inference_steps=steps, guidance_scale=guidance, sampler=sampler
        )
        once = Drawing.of(how, seed, batch, threshold and threshold.value)
        drawings = [replace(once, **({name: value} if name else {})) for value in values]
        size = pipes[-1].family.side(pipes[-1].network) * pipes[-1].codec.factor
        judge = None
        if own and that_need("judge") & {*asked} and not any(each.judge for each in spaces):
            judge = features.space(own, device).judge
        truth = References(
            spaces,
            size,
            judge=judge,
            compared=None if data is None else _pictures(data, size),
            lists=prompts,
        )
        for chosen in asked:  # what is wrong with it is told before hours of drawing
            SUITES[chosen].prepared(truth, count)
        measurer = Evaluator(pipes[-1], truth, partial(saved, str(model)))
        own_bounds = [pipe.scheduler for pipe in pipes]
        given = {"steps": steps, "guidance": guidance, "sampler": sampler}
        for chosen in asked:
            several: list[Report] = []
            for drawing in drawings:
                told = f"{chosen.value}, {name} {getattr(drawing, name)}" if name else chosen.value
                spent = Spent()
                for each, scheduler in zip(pipes, own_bounds, strict=True):
                    each.scheduler = _bounded(scheduler, drawing.threshold)
                through = row and _through(row, behind, given, drawing, name)
                draw = draw_with(pipes, drawing, told, spent, through)
                report = SUITES[chosen].measured(measurer, draw, count)
                several.append(replace(report, spent=spent))
            reports[chosen.value] = several
            _print(console, chosen.value, heads(drawings, name), rows(several))
            write(out, [model, *then], loras, data, reports, drawings, name, environment())
            show(out, chosen.value, several, drawings, name)
    except (ValueError, OSError) as error:
        fail(error)
    console.print(str(out), highlight=False, soft_wrap=True)


def _bounded(scheduler: Any, threshold: str | None) -> Any:
    """``scheduler`` that keeps x0 within bounds as ``threshold`` says; None: as it does."""
    from ldm.guidance import Threshold

    if threshold is None:
        return scheduler
    return scheduler.from_config(
        {**scheduler.config, **Threshold.stated(threshold, scheduler.config)}
    )


def _through(
    row: Cascade, behind: staged.Behind, given: dict[str, Any], drawing: Drawing, swept: str
) -> Callable[[dict[str, Any]], Any]:
    """Draws by all of ``row`` what a call of its first asks for: as ``given``, None being what each
    folder states, but for what is ``swept``.
    """
    if drawing.noise_level is not None:
        behind = replace(behind, levels=[drawing.noise_level])
    whole = staged.Through(row, behind)
    every = given | {key: getattr(drawing, key) for key in given if key == swept}
    return lambda call: whole.draw(call, **every)[0]


def _pictures(data: str, size: int) -> Items:
    """What is trained on of ``data``, all of it where that is a path, as squares of side
    ``size``.
    """
    from ldm.cli.data import source_of
    from ldm.config.loader import load
    from ldm.config.sources import OneSource
    from ldm.data.collection import Collection
    from ldm.data.images import ImageTransform

    if data.lstrip().startswith("{"):
        source = load(OneSource, None, [f"data={data}"]).data
    else:
        source = source_of(data, caption_column=None, image_column=None, held_out_fraction=0.0)
    return Collection(source, ImageTransform(size=size)).train


def _print(console: Console, suite: str, heads: list[str], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=f"{suite}, 95 % intervals", title_justify="left")
    for head in heads:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    console.print(table)


app = typer.Typer(add_completion=False)
app.command(help=HELP)(evaluate)
