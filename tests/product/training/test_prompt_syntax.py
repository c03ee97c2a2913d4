"""Captions with weights, and longer than the tokenizer, by config."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.encoding.encoder import Encoder, reading
from ldm.engine.state import OtherRunError
from ldm.errors import ConfigError
from ldm.families.build import build
from runs import accelerator, train, tree

CAPTIONS = ["a (red:1.5) heart BREAK on paper", "a red heart on paper"]
ASKED = {"prompt_syntax": "a1111", "prompt_windows": 2}


@pytest.fixture
def pictures(tmp_path: Path) -> dict:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for n in range(12):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        rows.append(json.dumps({"file_name": f"{n}.png", "text": CAPTIONS[n % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return {"path": str(folder), "held_out_fraction": 0.2}


def weights(run: Path, **changes) -> dict[str, torch.Tensor]:
    final = train(run, duration="2 steps", batch_size=4, text_dropout=0.5, **changes)
    return load_file(final / "unet" / "diffusion_pytorch_model.safetensors")


def test_cached_or_not_a_run_reads_the_same(tmp_path, pictures, own_cache):
    cached = weights(tmp_path / "cached", data=pictures, **ASKED)
    straight = weights(tmp_path / "straight", data=pictures, cache_text=False, **ASKED)
    assert all(torch.equal(cached[name], straight[name]) for name in cached)
    plain = weights(tmp_path / "plain", data=pictures)  # of the same captions, in the same cache
    assert any(not torch.equal(cached[name], plain[name]) for name in cached)
    assert len([*(own_cache / "text").iterdir()]) >= 2
    with pytest.raises(OtherRunError, match="prompt_syntax was"):  # a run goes on as it began
        train(
            tmp_path / "cached", duration="3 steps", batch_size=4, text_dropout=0.5, data=pictures
        )


@torch.no_grad()
def test_what_the_network_is_told(tmp_path):
    found = {}
    for name, changes in {"plain": {}, "windows": {"prompt_windows": 2}, "weights": ASKED}.items():
        config = validate(TrainConfig, tree(tmp_path / name, cache_text=False, **changes))
        assert reading(config) == (None if name == "plain" else {
            "syntax": changes.get("prompt_syntax"), "windows": 2
        })  # fmt: skip
        model = build(config, CAPTIONS)
        encoder = Encoder(config, model.codec, model.conditioner, accelerator())
        batch = encoder.captions(["", CAPTIONS[1], "a (red:1.5) heart", "x" * 20])
        ids = batch["text_encoder.ids"]
        assert encoder.example(3)["text_encoder.ids"].shape[1] == ids.shape[1]
        found[name] = encoder.condition(batch | {"coordinates": torch.zeros(4, 6)}).tokens
    one = found["plain"].shape[1]
    assert found["windows"].shape[1] == found["weights"].shape[1] == 2 * one
    assert torch.equal(found["windows"][:3, :one], found["plain"][:3])
    assert torch.equal(found["windows"][:2], found["weights"][:2])
    assert float((found["windows"][2] - found["weights"][2]).abs().max()) > 1e-3
    empty = found["windows"][0, one:]
    assert torch.equal(found["windows"][1, one:], empty)  # a short caption is filled up
    assert not torch.equal(found["windows"][3, one:], empty)  # a long one goes on


def test_windows_are_between_one_and_many(tmp_path):
    for wrong in (0, 33):
        with pytest.raises(ConfigError, match="prompt_windows"):
            validate(TrainConfig, tree(tmp_path, prompt_windows=wrong))
