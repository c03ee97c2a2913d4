"""``frozen: bfloat16``: weights that do not learn in half the memory, and what stays the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from launched import logged
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import CheckpointError, ConfigError
from ldm.families.build import build
from ldm.formats.lora import FILE
from ldm.models import lora
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from ldm.tasks.estimate import trace
from loras import shake
from runs import train, tree

FAMILIES = {"sd": tiny, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
NUMBERS = ("", "_2", "_3")
HALF = {"precision": "bfloat16", "lora": {"rank": 2}, "train": ["unet", "text_encoder"]}


def config(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, tree(Path("run"), **HALF | changes))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def models(folder: Path, family: str, **changes: Any) -> list[Any]:
    """The same one twice, held in float32 and in bfloat16."""
    asked = {"published": False} if family == "sdxl" else {}
    parts = FAMILIES[family].components(**asked)
    LatentDiffusionPipeline(**{"unet": None, **parts}).save_pretrained(folder)
    told = {"model": str(folder), **dict.fromkeys(("vae", "text", "unet")), **changes}
    dtypes = ("float32", "bfloat16")
    return [build(config(**told, frozen=dtype), ["a red ring"]) for dtype in dtypes]


@pytest.mark.parametrize(
    ("family", "dora"),
    [
        *(
            pytest.param(name, False, marks=[pytest.mark.slow] * (name in ("sdxl", "sd3")))
            for name in FAMILIES
        ),
        ("sd", True),
    ],
)
def test_below_a_lora_no_bit_changes(tmp_path, family, dora):
    exact, half = models(tmp_path, family, lora={"rank": 2, "dora": dora})
    x = torch.randn(2, exact.codec.channels, 8, 8, generator=generator())
    coordinates = torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    said = []
    for model in (exact, half):
        for part in (model.family.network, "text_encoder"):
            shake(model.networks[part])
        for network in model.networks.values():
            network.requires_grad_(False)
        learning = {f"{part}.{name}": p for part in (model.family.network, "text_encoder")
                    for name, p in lora.weights(model.networks[part]).items()}  # fmt: skip
        for parameter in learning.values():
            parameter.requires_grad_(True)
        # What other text encoders say is rounded: both are told the same.
        first = model.conditioner.towers["text_encoder"]
        others = [t.encode(["a ring", ""]) for t in list(exact.conditioner.towers.values())[1:]]
        with torch.autocast("cpu", torch.bfloat16):
            cond = model.conditioner.join([first.encode(["a ring", ""]), *others])
            cond = replace(cond, extra=cond.extra | {"coordinates": coordinates})
            y = model.denoiser(x, torch.tensor(500.0), cond)
        y.float().square().sum().backward()
        said.append((y, {name: p.grad for name, p in learning.items()}))
    (y, grads), (again, others) = said
    assert y.dtype == torch.bfloat16 and y.any() and torch.equal(y, again)
    assert all(p.dtype == torch.float32 for p in lora.weights(half.network).values())
    heard = {name for name, grad in grads.items() if grad is not None and grad.any()}
    assert any(name.startswith("text_encoder") for name in heard) and len(heard) >= 20
    assert grads.keys() == others.keys()
    assert all(torch.equal(grads[name], others[name]) for name in heard)
    # All that autocast rounds is rounded already, and nothing else is.
    dtypes = {type(m).__mro__[1] if p.dtype == torch.bfloat16 else None: p.dtype
              for m in half.network.modules() for p in m.parameters(recurse=False)}  # fmt: skip
    assert {torch.nn.Linear, torch.nn.Conv2d} >= set(dtypes) - {None} != set()
    count = sum(p.numel() for p in half.network.parameters())
    held = sum(p.numel() for p in half.network.parameters() if p.dtype == torch.bfloat16)
    assert held / count > 0.7
    assert half.network.dtype == torch.float32  # in which it is drawn with
    if "vae" in half.networks:
        assert {p.dtype for p in half.networks["vae"].parameters()} == {torch.float32}


def test_what_text_encoders_say_is_rounded(tmp_path):
    exact, half = models(tmp_path, "sd3", train=["transformer"])
    one, other = (model.conditioner.encode(["a red ring"]) for model in (exact, half))
    for mine, theirs in ((one.tokens, other.tokens), (one.pooled, other.pooled)):
        assert theirs.dtype == torch.float32
        assert 1e-4 < float((mine - theirs).norm() / mine.norm()) < 1e-2


def test_a_run_that_knows_what_it_is_held_in(tmp_path, own_cache):
    base = train(tmp_path / "base", duration="1 step")
    (exact,) = (own_cache / "text").iterdir()
    told = dict(
        HALF, train=["unet"], model=str(base), vae=None, text=None, unet=None, batch_size=2,
        duration="1 step", validation={"every": "1 step", "images": 2, "levels": 1},
    )  # fmt: skip
    final = train(tmp_path / "run", **told, frozen="bfloat16")
    assert exact in (spaces := list((own_cache / "text").iterdir())) and len(spaces) == 2
    assert {x.dtype for x in load_file(final / FILE).values()} == {torch.float32}
    assert all(x > 0 for x in logged(tmp_path / "run", "held_out_loss"))
    told |= {"duration": "2 steps", "validation": None}
    with pytest.raises(CheckpointError, match='frozen was "bfloat16" and is now "float32"'):
        train(tmp_path / "run", **told)
    cost = {}
    for frozen in ("float32", "bfloat16"):
        asked = validate(TrainConfig, tree(tmp_path / "none", **told, frozen=frozen))
        cost[frozen] = trace(asked, text_to_image.step(asked), 4, 1)
    assert 0.5 < cost["bfloat16"].frozen / cost["float32"].frozen < 0.6  # the U-Net
    assert cost["bfloat16"].unread < cost["float32"].unread  # embeddings, autoencoder: as they are
    assert cost["float32"].learning == cost["bfloat16"].learning
    assert cost["bfloat16"].working <= cost["float32"].working


def test_where_all_weights_learn_what_is_frozen_is_saved_as_it_was(tmp_path, own_cache):
    """Text encoders rest in half the memory; in checkpoints they are links to what they were."""
    base = tmp_path / "base"
    LatentDiffusionPipeline(**tiny_sd3.components(), unet=None).save_pretrained(base)
    told = {
        "model": str(base), **dict.fromkeys(("vae", "text", "unet", "lora")), "batch_size": 2,
        "train": ["transformer", "text_encoder_2"], "frozen": "bfloat16", "ema": None,
        "checkpoints": {"every": "1 steps", "keep": 2}, "duration": "2 steps",
        "validation": {"every": "2 steps", "images": 2, "levels": 1},
    }  # fmt: skip
    run = tmp_path / "run"
    train(run, **told | {"duration": "1 steps"})
    final = train(run, **told)
    for part in ("vae", "text_encoder", "text_encoder_3"):
        kept, saved = (load_file(*(f / part).glob("*.safetensors")) for f in (base, final))
        assert all(torch.equal(saved[name], kept[name]) for name in kept), part
    moved = [load_file(folder / "text_encoder_2" / "model.safetensors") for folder in (base, final)]
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    file = Path("text_encoder_3") / "model.safetensors"
    last = run / "checkpoints" / "images-000000000004"
    assert (final / file).samefile(run / "frozen" / file) and (last / file).samefile(final / file)
    listed, whole = ({x.name for x in f.iterdir() if x.is_dir()} for f in (run / "frozen", final))
    assert listed == {"vae", "text_encoder", "text_encoder_3", *(f"tokenizer{n}" for n in NUMBERS)}
    assert whole == listed | {"transformer", "scheduler", "text_encoder_2"}
    asked = validate(TrainConfig, tree(run, **told))
    step = text_to_image.step(asked)
    assert step.saved == ("transformer", "text_encoder_2")
    assert step.unread == ("vae", "text_encoder", "text_encoder_3")
    model = build(asked, ["a ring"], meta=True)
    held = {name: {p.dtype for p in part.parameters()} for name, part in model.networks.items()}
    both = {torch.float32, torch.bfloat16}
    assert held["text_encoder"] == held["text_encoder_3"] == both
    assert held["transformer"] == held["text_encoder_2"] == held["vae"] == {torch.float32}


def test_where_it_cannot_be():
    told = "in precision float32 every weight would be turned back"
    with pytest.raises(ConfigError, match=f"^frozen: bfloat16: {told}") as caught:
        build(config(precision="float32", frozen="bfloat16"), [], meta=True)
    assert "\n" not in str(caught.value)


def test_not_in_shards(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="^frozen: bfloat16 is not supported in shards"):
        text_to_image.train(config(frozen="bfloat16"), None)
