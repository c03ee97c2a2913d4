"""Runs over pictures of mixed sizes: buckets, what is skipped, several sources."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from programs import told
from runs import train, tree

SIZES = [(40, 24), (24, 40), (32, 32), (56, 28), (20, 20), (64, 16)]


@pytest.fixture
def mixed(tmp_path) -> Path:
    """24 pictures of six shapes, one of them broken and one without a caption."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(24):
        width, height = SIZES[n % 6]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
            folder / f"{n}.png"
        )
        (folder / f"{n}.txt").write_text(f"picture {n}")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    (folder / "7.txt").unlink()
    return folder


def changes(folder: Path, **more) -> dict:
    return {
        "data": {"path": str(folder), "held_out_fraction": 0.1},
        "images": {"size": 32, "buckets": {"step": 8}},
        "batch_size": 4,
        "on_bad_sample": "skip",
        **more,
    }


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_over_buckets(tmp_path, mixed, monkeypatch, cached):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    validation = {"every": "12 steps", "images": 4}
    more = dict(duration="12 steps", cache_latents=cached, validation=validation)
    train(tmp_path / "run", **changes(mixed, **more))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and np.isfinite(losses).all()
    skipped = [json.loads(x) for x in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["key"] for entry in skipped) == ["5.png", "7.png"]
    assert all(entry["source"] == str(mixed) and ";" in entry["reason"] for entry in skipped)


def test_cached_or_not_the_same_losses(tmp_path, mixed, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    found = []
    for cached in (True, False):
        run = tmp_path / str(cached)
        train(run, **changes(mixed, duration="8 steps", cache_latents=cached))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append(torch.tensor([line["loss"] for line in lines]))
    assert ((found[0] - found[1]) / found[1]).abs().max() < 1e-5


def test_bad_pictures_end_the_run_unless_skipped(command, tmp_path, mixed):
    plain = tree(tmp_path / "run", **changes(mixed, on_bad_sample="error"))
    message = told(*command(plain))
    assert message.startswith(f"{mixed}: 1 pictures that cannot be read (")
    assert "(and 1 other problems), or set on_bad_sample to skip" in message


def test_the_bucket_table_is_shown_before_a_run(tmp_path, mixed, monkeypatch, capsys):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    read = validate(TrainConfig, tree(tmp_path / "run", **changes(mixed)))
    collection = Collection(read.data, read.images, read.on_bad_sample)
    shapes = {tuple(shape) for shape in collection.train.shapes.tolist()}
    assert len(shapes) >= 4 and all(w % 8 == h % 8 == 0 for w, h in shapes)
    assert all(w * h <= 32 * 32 for w, h in shapes)


def test_step_that_the_autoencoder_cannot_halve(command, tmp_path, mixed):
    images = {"size": 33, "buckets": {"step": 11}}
    plain = tree(tmp_path / "run", **changes(mixed, images=images))
    message = told(*command(plain))
    assert message == "images.buckets.step 11 is no multiple of 2, the pixels of a latent"
