"""The share of hits that a run reports, from models that draw what a test tells them to."""

import json
from types import SimpleNamespace

import torch
from PIL import Image

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import to_pixels
from ldm.demo.shapes import ShapesData
from ldm.sampling.defaults import SamplingDefaults
from ldm.tasks.score import score
from programs import told
from runs import accelerator, tree


def artist(items, transform, shift):
    """Draws, for the first caption of a picture, the picture ``shift`` places behind it."""
    known = {item.caption(None): n for n, item in enumerate(items)}
    x = torch.stack([to_pixels(transform(item.load())) for item in items])
    calls = []

    def draw(captions, **settings):
        calls.append((captions, settings))
        return SimpleNamespace(
            images=x[[(known[c] + shift) % len(items) for c in captions]] / 2 + 0.5
        )

    return draw, calls


def test_hits_of_every_source_and_model(tmp_path):
    config = validate(
        TrainConfig, tree(tmp_path, score={"captions": 5, "shown": 2, "before": True, "seed": 7})
    )
    sources = [ShapesData(count=12, size=16), ShapesData(count=9, size=16, seed=1)]
    items = Collection(sources, config.images).train
    truth, calls = artist(items, config.images, 0)
    wrong, other = artist(items, config.images, 1)
    models = {"before": wrong, "drawn": truth}
    how = SamplingDefaults(num_inference_steps=3)
    found = score(models, config, items, tmp_path, accelerator(), how)  # type: ignore[arg-type]
    assert calls == other  # same captions, seeds and steps
    assert len(calls[0][0]) == 10
    assert calls[0][1]["seed"] == 7 and calls[0][1]["num_inference_steps"] == 3
    assert list(found) == ["shapes (1)", "shapes (2)"]
    for models in found.values():
        assert {m: (p.value, p.n) for m, p in models.items()} == {"before": (0, 5), "drawn": (1, 5)}
    record = json.loads((tmp_path / "score.json").read_text())
    assert record["gallery"] == len(items)
    assert [entry["drawn"]["top1"]["value"] for entry in record["scores"]] == [1, 1]
    # Two groups of each source; before, after and true picture, twice as large.
    assert Image.open(tmp_path / "samples.png").size == (4 * (3 * 32 + 8), 32 + 30)


def test_before_needs_a_model(tmp_path, command):
    config = tree(tmp_path / "run", score={"captions": 4, "before": True})
    assert told(*command(config)) == "score.before draws from what a run starts from: give model"
