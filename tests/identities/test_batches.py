"""A batch of the loader is its images side by side, and its numbers those of their streams."""

from hashlib import sha256

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.diffusion import Streams, normal, normals, stream
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.engine.workers import loader
from ldm.families.build import build
from runs import accelerator, tree


def philox(seed_key: tuple[int, int], index: int) -> np.random.Generator:
    """By NumPy's own words for a key and a counter."""
    counter = np.array([0, 0, index, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array(seed_key, np.uint64), counter=counter))


def test_streams_are_philox_with_the_key_of_their_name():
    digest = sha256(b"7/flip").digest()
    key = tuple(int.from_bytes(digest[n : n + 8], "little") for n in (0, 8))
    many = Streams(7, "flip")
    for index in (5, 0, 2**33, 5):
        drawn = [
            [*draw.integers(7, size=3), *draw.random(2), *draw.standard_normal(9, np.float32)]
            for draw in (philox(key, index), stream(7, "flip", index), many[index])
        ]
        assert drawn[0] == drawn[1] == drawn[2]
    rows = normals(7, "noise", [3, 0, 3], (2, 5))
    assert rows.dtype == torch.float32 and torch.equal(rows[0], rows[2])
    expected = stream(7, "noise", 3).standard_normal((2, 5), np.float32)
    assert torch.equal(rows[0], torch.from_numpy(expected))
    assert torch.equal(rows[1], normal(7, "noise", 0, (2, 5)))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not"])
def test_a_batch_is_its_images(tmp_path, monkeypatch, cached):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    plain = tree(tmp_path / "run", data={"count": 12}, text_dropout=0.4, cache_latents=cached,
                 cache_text=cached)  # fmt: skip
    config = validate(TrainConfig, plain)
    collection = Collection(config.data, config.images)
    model = build(config, collection.captions())
    encoder = Encoder(config, model.codec, model.conditioner, accelerator())
    encoder.prepare(collection, collection.captions())
    draws = ImageDraws(config, collection, encoder)
    positions = [*range(40, 48)]
    (batch,) = loader(draws, [positions], 0)
    rows = default_collate([draws[position] for position in positions])
    assert batch.keys() == rows.keys() >= {"position", "noise", "posterior", "u", "coordinates"}
    for name, value in batch.items():
        assert value.dtype == rows[name].dtype and torch.equal(value, rows[name]), name
    assert batch["position"].tolist() == positions and batch["u"].dtype == torch.float64
    shape = encoder.codec.shape(16, 16)
    for row, position in enumerate(positions):
        for name in ("noise", "posterior"):
            assert torch.equal(batch[name][row], normal(3, name, position, shape))
    # The draws of each image, by hand.
    for row, position in enumerate(positions):
        item = draws.item(position)
        view = config.images.views[int(stream(3, "flip", position).integers(2))]
        told = stream(3, "text dropout", position).random() >= 0.4
        text = item.caption(stream(3, "caption", position)) if told else ""
        if cached:
            x = encoder._pixels([item], [view])
            assert torch.allclose(batch["mean"][row], encoder.codec.encode(x).mean[0], atol=1e-5)
            said = model.conditioner.encode([text]).tokens[0]
            assert torch.allclose(batch["text_encoder.tokens"][row], said, atol=1e-5)
        else:
            assert torch.equal(batch["pixels"][row], encoder._pixels([item], [view])[0])
            ids = model.conditioner.tokenize([text])[0]
            assert torch.equal(batch["text_encoder.ids"][row], ids)
