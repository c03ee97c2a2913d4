"""What a finished run draws, scored against its own training pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from ldm.config.schema import Score, TrainConfig
from ldm.data.images import to_image, to_pixels
from ldm.data.items import Items, evenly_spaced
from ldm.evaluation import sheets
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.pipeline import LatentDiffusionPipeline
from ldm.progress import track
from ldm.sampling import SamplingDefaults

Scores = dict[str, dict[str, Proportion]]
"""Share of hits by source, and there by model."""


def score(
    pipes: Mapping[str, LatentDiffusionPipeline],
    config: TrainConfig,
    items: Items,
    run: Path,
    accelerator: Accelerator,
    how: SamplingDefaults,
) -> Scores:
    """Draws first captions of every source of ``items`` and counts whose nearest picture is their
    own.

    The space is that of pixels: Euclidean distance between pictures as the config transforms them,
    among *all* of ``items``. Also writes ``run/samples.png`` (what each model draws, and the true
    picture, side by side) and ``run/score.json``.

    Args:
        pipes: the models by name; all draw the same captions from the same seeds.
        config: counts and seed are those of ``config.score``.
        items: what was trained on.
        run: folder of the run.
        accelerator: the processes, which all draw; the main one counts and writes, and for the
            others the result is empty.
        how: all of them draw.
    """
    settings = config.score or Score()
    numbers = {
        name: evenly_spaced(
            [n for n, s in enumerate(items.source.tolist()) if s == k], settings.captions
        )
        for k, name in enumerate(_names(items))
    }
    numbers = {name: mine for name, mine in numbers.items() if mine}
    chosen = [n for mine in numbers.values() for n in mine]
    captions = [items[n].caption(None) for n in chosen]
    drawn = {
        model: sheets.drawn(
            pipe,
            captions,
            accelerator,
            what=f"the score's pictures, {model}",
            seed=settings.seed,
            prompt_syntax=config.prompt_syntax,
            batch=config.micro_batch_size or 64,
            **asdict(how),
            height=config.images.size,
            width=config.images.size,
        )
        for model, pipe in pipes.items()
    }
    if not accelerator.is_main_process:
        return {}
    true = track(items, "reading the pictures to compare with", total=len(items))
    gallery = torch.stack([to_pixels(config.images(item.load())) for item in true])
    rank = {
        model: ranks(torch.stack(x), gallery, torch.tensor(chosen)) for model, x in drawn.items()
    }

    found: Scores = {}
    record, shown, first = [], [], 0
    for name, mine in numbers.items():
        found[name], entry = {}, {"source": name}
        for model in pipes:
            own = rank[model][first : first + len(mine)]
            hits = found[name][model] = Proportion.of(int((own == 0).sum()), len(mine))
            top5 = Proportion.of(int((own < 5).sum()), len(mine))
            entry[model] = {"top1": hits._asdict(), "top5": top5._asdict()}
        record.append(entry)
        shown += [first + n for n in evenly_spaced(range(len(mine)), settings.shown)]
        first += len(mine)
    cells: list[list[Image.Image]] = [
        [*(to_image(x[n]) for x in drawn.values()), to_image(gallery[chosen[n]])] for n in shown
    ]
    page = sheets.sheet(cells, [captions[n] for n in shown], columns=4)
    sheets.save(page, run / "samples.png")
    measure = "nearest training picture by pixels is the one the caption names"
    scores = {"measure": measure, "gallery": len(items), "scores": record}
    (run / "score.json").write_text(json.dumps(scores, indent=1))
    return found


def _names(items: Items) -> list[str]:
    """The sources' names, told apart by number where two are called the same."""
    names = [source.name for source in items.sources]
    return [
        name if names.count(name) == 1 else f"{name} ({number + 1})"
        for number, name in enumerate(names)
    ]
