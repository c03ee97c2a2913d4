"""Frozen networks leave once all that they say is cached, and come back for a validation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTextModel

import tiny
import tiny_sd3
from launched import logged, losses
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.encoding.encoder import Encoder
from ldm.errors import ConfigError
from ldm.families import FAMILIES
from ldm.formats.lora import FILE
from ldm.models.half_storage import halve
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import resting
from ldm.tasks.denoising import DenoisingTask
from ldm.tasks.estimate import held
from ldm.tasks.resting import Resting
from ldm.tasks.text_to_image import step
from runs import train, tree


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "model")


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    validation = {"every": "2 steps", "images": 2, "levels": 1, "prompts": ["a ring"], "steps": 1}
    own = dict.fromkeys(("vae", "text", "unet"))
    return dict(own, model=str(base), lora={"rank": 2}, batch_size=4, duration="2 steps",
                validation=validation) | changes  # fmt: skip


@pytest.fixture
def seen(monkeypatch) -> dict[str, list[Any]]:
    """Where networks are in every step, and which are read from folders when."""
    found: dict[str, list[Any]] = {"steps": [], "read": []}
    forward, read, read_vae = DenoisingTask.forward, resting.read, resting.read_vae

    def step(task: DenoisingTask, batch: Any) -> Any:
        devices = {name: {p.device.type for p in network.parameters()}
                   for name, network in task.model.networks.items()}  # fmt: skip
        found["steps"].append(devices)
        return forward(task, batch)

    def noted(function: Any) -> Any:
        return lambda *told: (found["read"].append(len(found["steps"])), function(*told))[1]

    monkeypatch.setattr(DenoisingTask, "forward", step)
    monkeypatch.setattr(resting, "read", noted(read))
    monkeypatch.setattr(resting, "read_vae", noted(read_vae))
    return found


def test_below_a_lora_they_leave_and_change_no_bit(base, tmp_path, own_cache, monkeypatch, seen):
    gone = train(tmp_path / "gone", **settings(base))
    whole = {"unet": {"cpu"}, "vae": {"cpu"}, "text_encoder": {"cpu"}}
    assert seen["steps"] == [whole | {"vae": {"meta"}, "text_encoder": {"meta"}}] * 2
    assert seen["read"] == [2, 2]  # each once, by the one validation
    text = train(tmp_path / "text", **settings(base, cache_latents=False, validation=None))
    assert seen["steps"][2:] == [whole | {"text_encoder": {"meta"}}] * 2 and len(seen["read"]) == 2
    learns = settings(base, train=["unet", "text_encoder"], validation=None, duration="1 step")
    train(tmp_path / "learns", **learns)
    assert seen["steps"][4:] == [whole | {"vae": {"meta"}}]
    monkeypatch.setattr(Encoder, "unread", [])
    kept = train(tmp_path / "kept", **settings(base))
    assert seen["steps"][5:] == [whole] * 2 and len(seen["read"]) == 2
    for key in ("loss", "held_out_loss"):
        found = logged(tmp_path / "kept", key)
        assert logged(tmp_path / "gone", key) == found and found
    assert losses(tmp_path / "text") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)
    pages = [sorted((tmp_path / run / "samples").iterdir()) for run in ("gone", "kept")]
    assert [page.read_bytes() for page in pages[0]] == [page.read_bytes() for page in pages[1]]
    one, other = (load_file(final / FILE) for final in (gone, kept))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert text.is_dir()


def test_what_a_run_saves_waits_beside_the_device():
    class Moved(list):
        device, to = None, list.append

    network = Moved()
    rests = Resting(SimpleNamespace(networks={"vae": network}), ["vae"], None, half=False)
    with rests.back(torch.device("cuda:1"), "validation.images"):
        assert network == [torch.device("cpu"), torch.device("cuda:1")]
    assert network[2:] == [torch.device("cpu")]


def test_what_comes_back_is_what_left(tmp_path):
    """Of all kinds of text encoders, tied weights and numbers that are no parameters among them."""
    parts, family = tiny_sd3.components(), FAMILIES["sd3"]
    LatentDiffusionPipeline(**parts, unet=None).save_pretrained(tmp_path)
    conditioner = family.conditioner(parts, parts)
    names, told = ["vae", *conditioner.towers], ["two dogs", "a red apple"]
    before = conditioner.encode(told)
    kept = {name: {n: x.clone() for n, x in parts[name].state_dict().items()} for name in names}
    for half in (False, True):
        for name in names[1:] if half else ():
            halve(parts[name])  # as the model of such a run is built
        rests = Resting(SimpleNamespace(networks=parts, family=family), names, tmp_path, half=half)
        for _ in range(2):
            every = [p for name in names for p in parts[name].parameters()]
            assert {p.device.type for p in every} == {"meta"}
            with rests.back(torch.device("cpu"), "this test"):
                now = conditioner.encode(told)
                for name in names:
                    found = parts[name].state_dict()
                    assert found.keys() == kept[name].keys()
                    assert {x.dtype for x in found.values()} == (
                        {torch.float32, torch.bfloat16} if half and name != "vae" else
                        {torch.float32})  # fmt: skip
                    assert all(torch.equal(x, kept[name][n].to(x.dtype)) for n, x in found.items())
            error = 0.05 if half else 1e-5
            assert torch.allclose(now.tokens, before.tokens, rtol=error, atol=error)
            assert torch.allclose(now.pooled, before.pooled, rtol=error, atol=error)


def test_another_network_in_its_place_is_refused(base, tmp_path):
    for name in ("vae", "text_encoder"):
        (tmp_path / name).symlink_to(base / name)
    model = SimpleNamespace(
        networks={"vae": tiny.vae()}, family=SimpleNamespace(towers=())
    )  # fmt: skip
    pixels = torch.zeros(1, 3, 16, 16)
    before = model.networks["vae"].encode(pixels).latent_dist.mean
    rests = Resting(model, ["vae"], base, half=False)
    with rests.back(torch.device("cpu"), "validation.images"):
        vae = model.networks["vae"]
        assert vae.encode(pixels).latent_dist.mean.shape == before.shape
        assert not any(p.requires_grad for p in vae.parameters())
    assert {p.device.type for p in model.networks["vae"].parameters()} == {"meta"}
    other = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,))
    (tmp_path / "vae").unlink()
    other.save_pretrained(tmp_path / "vae")
    rests = Resting(model, ["vae"], tmp_path, half=False)
    with pytest.raises(ConfigError, match="vae holds another network than when the run began"):
        with rests.back(torch.device("cpu"), "validation.images"):
            pass


def test_the_estimate_counts_what_stays(base, tmp_path):
    def asked(**changes: Any) -> TrainConfig:
        return validate(TrainConfig, tree(tmp_path, **settings(base, **changes)))

    text, vae = (
        4 * sum(p.numel() for p in cls.from_pretrained(base / name).parameters())
        for name, cls in (("text_encoder", CLIPTextModel), ("vae", AutoencoderKL))
    )
    said, full = (step(asked(**changes)) for changes in ({"cache_text": False}, {"lora": None}))
    # What a run saves waits in memory, which on a CPU is where it computes.
    assert (said.unread, full.unread) == (("vae",), ())
    made = step(config := asked())
    every = {name: 4 * sum(p.numel() for p in network.parameters())
             for name, network in made.networks.items()}  # fmt: skip
    cost = held(config, made)
    assert cost.unread == vae + text and cost.frozen + cost.learning == every["unet"]
