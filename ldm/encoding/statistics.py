"""Mean and standard deviation of the embeddings of a run's pictures, measured once before it
begins.

They are kept in the model, so that a run that goes on has those that it began with.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ldm.data.collection import Collection
from ldm.data.images import View
from ldm.data.items import evenly_spaced
from ldm.encoding.asides import MADE
from ldm.encoding.encoder import Encoder
from ldm.errors import ConfigError
from ldm.families.model import Model
from ldm.models.embedding import EMBEDDING
from ldm.progress import track
from ldm.storage import checkpoint
from ldm.storage.tensors import read_network

PICTURES = 4096
_LEAST = 1e-6  # of a standard deviation
_STEPS = 1024


def measure(model: Model, encoder: Encoder, collection: Collection, run: Path) -> None:
    """Puts mean and standard deviation of embeddings of up to 4,096 training pictures into
    ``model``, or those of the newest checkpoint of ``run``.

    Args:
        model: its family states where they lie (``Family.statistics``).
        encoder: whose caches are made.
        collection: the pictures.
        run: folder of the run.

    Raises:
        ConfigError: the pictures are a stream.
    """
    assert model.family.statistics is not None
    part, *names = model.family.statistics
    folder = checkpoint.newest(run / "checkpoints")
    if folder is not None:
        kept = read_network(folder / part)
        found = [kept[name] for name in names]
    else:
        found = [broadcast(value) for value in _statistics(encoder, collection)]
    for name, value in zip(names, found, strict=True):
        place = getattr(model.networks[part], name)
        place.data.copy_(value.reshape(place.shape))


@torch.no_grad()
def _statistics(encoder: Encoder, collection: Collection) -> tuple[Tensor, Tensor]:
    """Each ``d``, float32; rounded to 1,024 steps, since embeddings that were made one by one or in
    batches differ in their last digits.
    """
    if collection.epoch is None:
        raise ConfigError(
            "data.streaming: mean and standard deviation of embeddings are measured before a run"
            " begins, which a stream does not allow: set model to a folder that has them"
        )
    images, device = encoder.config.images, encoder.accelerator.device
    view = images.views[0] if images.deterministic else View()
    items = sorted(evenly_spaced(collection.train, PICTURES), key=lambda item: item.shape)
    alike = [[*each] for _, each in groupby(items, key=lambda item: item.shape)]
    size = encoder.batch
    batches = [each[at : at + size] for each in alike for at in range(0, len(each), size)]
    rows = list[Tensor]()
    for batch in track(batches, "measuring embeddings", "batches"):
        found = encoder.pictures(batch, [view] * len(batch))
        if (name := f"{MADE}{EMBEDDING}") in found:
            rows.append(found[name])
        elif not encoder.asides and "mean" in found:
            rows.append(found["mean"])
        else:
            pixels = found["pixels"].to(device)
            rows.append(encoder.asides.made(pixels)[EMBEDDING] if encoder.asides
                        else encoder.codec.encode(pixels).mean)  # fmt: skip
    every = torch.cat([row.double().cpu() for row in rows])
    share, exponent = torch.frexp(every.std(0, correction=0).clamp(min=_LEAST))
    std = torch.ldexp((share * _STEPS).round() / _STEPS, exponent)
    mean = (every.mean(0) / std * _STEPS).round() / _STEPS * std
    return mean.float().to(device), std.float().to(device)
