"""What a finished run draws, scored against its own training pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from ldm.data.collection import Items, spread
from ldm.data.images import to_pixels
from ldm.engine import pictures
from ldm.engine.schema import Score, TrainConfig
from ldm.evaluation.retrieval import Proportion, ranks
from ldm.pipeline import LatentDiffusionPipeline


def score(
    pipe: LatentDiffusionPipeline, config: TrainConfig, items: Items, run: Path
) -> Proportion:
    """Draws first captions of ``items`` and counts whose nearest picture is their own.

    The space is that of pixels: Euclidean distance between pictures as the config transforms them,
    among *all* of ``items``. Also writes ``run/samples.png`` (drawn and true side by side) and
    ``run/score.json``.
    """
    settings = config.score or Score()
    chosen = spread(range(len(items)), settings.captions)
    count = len(chosen)
    captions = [items[i].caption(None) for i in chosen]
    gallery = torch.stack([to_pixels(config.images(item.load())) for item in items])
    drawn = (
        pipe(
            captions,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            sampler=settings.sampler,
            seed=settings.seed,
            batch_size=config.micro_batch_size or 64,
            output_type="pt",
            height=config.images.size,
            width=config.images.size,
        )
        .images.float()
        .cpu()
    )
    rank = ranks(drawn * 2 - 1, gallery, torch.tensor(chosen))
    hits = Proportion.of(int((rank == 0).sum()), count)
    shown = spread(range(count), settings.shown)
    cells: list[list[Image.Image]] = [
        [pictures.to_image(drawn[n] * 2 - 1), pictures.to_image(gallery[chosen[n]])] for n in shown
    ]
    page = pictures.sheet(cells, [captions[n] for n in shown], columns=4)
    pictures.save(page, run / "samples.png")
    record = {
        "measure": "nearest training picture by pixels is the one the caption names",
        "gallery": len(items),
        "top1": hits._asdict(),
        "top5": Proportion.of(int((rank < 5).sum()), count)._asdict(),
    }
    (run / "score.json").write_text(json.dumps(record, indent=1))
    return hits
