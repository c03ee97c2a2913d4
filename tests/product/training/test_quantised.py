"""``frozen: int8`` and ``nf4``: what lies below a LoRA in 8 and 4 bits."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launched import logged
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import CheckpointError, ConfigError
from ldm.families.build import build
from ldm.formats.lora import FILE
from ldm.models import quantised
from ldm.models.quantised import quantise
from ldm.tasks import text_to_image
from ldm.tasks.estimate import trace
from ldm.tasks.fitting import choices
from runs import train, tree

WIDE = {"block_out_channels": [64], "attention_head_dim": 4, "norm_num_groups": 8}
HALF = {"precision": "bfloat16", "lora": {"rank": 2}, "ema": None, "batch_size": 4}
OWN = dict.fromkeys(("vae", "text", "unet"))


@pytest.fixture
def low() -> Any:
    """The package, which not every installation has: peft imports it, which takes a second."""
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def _installed(monkeypatch):
    """For what is measured and not computed, the package is not asked."""
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())


def config(run, **changes: Any) -> TrainConfig:
    return validate(TrainConfig, tree(run, **{"unet": WIDE, **HALF, **changes}))


def layer(low: Any, bits: str) -> tuple[nn.Linear, nn.Module, torch.Tensor]:
    """A linear layer, the same in ``bits``, and its weight as that is turned back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Linear(128, 192)
    network = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 192), nn.Linear(192, 32 + 1))
    network[1].load_state_dict(plain.state_dict())
    assert quantise(network, bits) == (1 if bits == "nf4" else 2)
    weight = network[1].weight
    if bits == "nf4":
        return plain, network[1], low.functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain, network[1], weight.data.float() * weight.SCB[:, None] / 127


def test_of_int8_every_weight_is_the_nearest_of_255(low):
    plain, held, back = layer(low, "int8")
    assert held.weight.dtype == torch.int8
    scale = plain.weight.detach().half().abs().amax(1, keepdim=True).float()
    assert float((back - plain.weight).abs().max() / scale.max()) <= 0.5 / 127 + 2**-10
    assert torch.equal(held.weight.SCB[:, None], scale)


def test_of_nf4_every_weight_is_the_nearest_of_16(low):
    plain, held, back = layer(low, "nf4")
    assert held.weight.numel() == plain.weight.numel() // 2
    blocks = plain.weight.detach().bfloat16().float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = low.functional.get_4bit_type("nf4", device="cpu")
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * scale).reshape(back.shape)
    assert float((back.float() - expected).norm() / expected.norm()) < 2**-8  # of bfloat16
    apart = float((back.float() - plain.weight).norm() / plain.weight.norm())
    assert 0.07 < apart < 0.11


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_products_and_gradients_are_those_of_the_weights(low, bits):
    plain, held, back = layer(low, bits)
    x = torch.randn(4, 7, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = held(x)
    y.float().square().sum().backward()
    mine, x.grad = x.grad, None
    exact = nn.functional.linear(x, back.float(), plain.bias)
    exact.square().sum().backward()
    assert float((y.float() - exact).norm() / exact.norm()) < 2e-2
    assert float((mine - x.grad).norm() / x.grad.norm()) < 2e-2
    assert held.weight.grad is None and not held.weight.requires_grad


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, low, bits):
    base = train(tmp_path / "base", duration="1 step", unet=WIDE)
    told = {**HALF, "model": str(base), **OWN, "frozen": bits, "validation": None}
    whole = train(tmp_path / "whole", **told, duration="4 steps")
    halves = tmp_path / "halves"
    train(halves, **told, duration="2 steps")
    again = train(halves, **told, duration="4 steps")
    first, second = (load_file(folder / FILE) for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert {x.dtype for x in first.values()} == {torch.float32}
    assert any(float(x.abs().max()) > 0 for name, x in first.items() if "lora_B" in name)
    told |= {"duration": "5 steps", "frozen": "bfloat16"}
    with pytest.raises(CheckpointError, match=f'frozen was "{bits}" and is now "bfloat16"'):
        train(halves, **told)


def test_what_is_learnt_is_near_what_is_learnt_above_bfloat16(tmp_path, low):
    base = train(tmp_path / "base", duration="20 steps", unet=WIDE)
    losses = {}
    for frozen in ("bfloat16", "int8", "nf4"):
        told = {**HALF, "model": str(base), **OWN, "frozen": frozen, "duration": "2 steps"}
        told["validation"] = {"every": "2 steps", "images": 4, "levels": 3}
        train(tmp_path / frozen, **told)
        (losses[frozen],) = logged(tmp_path / frozen, "held_out_loss")
    assert losses["int8"] == pytest.approx(losses["bfloat16"], rel=3e-3)
    assert losses["nf4"] == pytest.approx(losses["bfloat16"], rel=3e-2)
    assert len(set(losses.values())) == 3


def test_a_model_that_is_only_measured_takes_what_the_real_one_takes(tmp_path, low):
    for bits in ("int8", "nf4"):
        asked = config(tmp_path / "none", frozen=bits)
        held = [build(asked, ["a ring"], meta=meta).network for meta in (True, False)]
        sizes = [sum(p.nbytes for p in network.parameters()) for network in held]
        states = (getattr(p, "quant_state", None) for p in held[1].parameters())
        beside = sum(state.absmax.nbytes for state in states if state is not None)
        assert sizes[0] == sizes[1] + beside


@pytest.mark.usefixtures("_installed")
def test_memory_is_told_before_anything_is_held(tmp_path):
    costs = {}
    for frozen in ("bfloat16", "int8", "nf4"):
        asked = config(tmp_path / "none", frozen=frozen)
        costs[frozen] = trace(asked, text_to_image.step(asked), 4, 1)
    assert costs["nf4"].frozen < costs["int8"].frozen < costs["bfloat16"].frozen
    assert costs["nf4"].learning == costs["bfloat16"].learning
    assert costs["nf4"].product == pytest.approx(costs["bfloat16"].product, rel=0.01)
    offered = [text for text, *_ in choices(config(tmp_path / "none"))]
    assert {"frozen=bfloat16", "frozen=int8", "frozen=nf4"} <= {*offered}
    whole = config(tmp_path / "none", precision="float32")  # which refuses all of them
    assert not any("frozen=" in text for text, *_ in choices(whole))
    lower = [text for text, *_ in choices(config(tmp_path / "none", frozen="int8"))]
    assert [text for text in lower if "frozen=" in text] == ["frozen=nf4"]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": None}, "frozen: nf4: only what lies below a LoRA is held so: give lora, or"),
        ({"lora": {"rank": 2, "dora": True}}, "frozen: nf4: DoRA takes the norm of whole weights"),
        ({"precision": "float32"}, "frozen: nf4: in precision float32 every weight would be"),
        ({"unet": {"block_out_channels": [24]}}, "frozen: nf4: no linear layer is of a multiple"),
    ],
)
def test_where_it_cannot_be(tmp_path, changes, told):
    with pytest.raises(ConfigError) as caught:
        build(config(tmp_path, frozen="nf4", **changes), [], meta=True)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^frozen: int8: it needs bitsandbytes, which is not"):
        build(config(tmp_path, frozen="int8"), [], meta=True)


def test_not_in_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="^frozen: nf4 is not supported in shards"):
        text_to_image.train(config(tmp_path, frozen="nf4"), None)
