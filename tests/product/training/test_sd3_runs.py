"""SD3 trained: from random init and from its folder, cached texts or not, towers dropped apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file

from launched import ENVIRONMENT, digests, finish, losses, start, steps, wait_for
from ldm.config.loader import load, validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.demo.shapes import ShapesData
from ldm.diffusion import RectifiedFlow
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.tensors import read_network
from runs import ROOT, accelerator, train, tree

CLIP = {"vocab_size": 600, "max_length": 16, "hidden_size": 16, "intermediate_size": 32,
        "layers": 2, "heads": 2, "projection": 16}  # fmt: skip
T5 = {"kind": "t5", "vocab_size": 600, "max_length": 12, "hidden_size": 32,
      "intermediate_size": 32, "layers": 1, "heads": 2, "head_dim": 8}  # fmt: skip
SHIFT = {"base": 0.5, "max": 1.15, "from": 4, "to": 64}
CALL: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "family": "sd3", "text": [CLIP, CLIP | {"activation": "gelu"}, T5], "unet": None,
        "vae": {"latent_channels": 16, "quant_conv": False},
        "transformer": {"layers": 2, "heads": 2, "head_dim": 8, "positions": 8, "dual_attention": 1,
                        "qk_norm": True},
        "process": {"kind": "rectified_flow", "shift": SHIFT},
        "objective": {"target": "velocity", "times": "logit_normal"},
        "optimizer": {"lr": 1e-2}, "text_dropout": [0.3, 0.3, 0.3], "duration": "4 steps",
        **changes,
    }  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_caches_and_going_on_change_no_bit(tmp_path):
    told = settings(duration="2 steps")
    final = train(tmp_path / "whole", **told)
    train(tmp_path / "bare", **told, cache_text=False)
    train(tmp_path / "parts", **told | {"duration": "1 steps"})
    train(tmp_path / "parts", **told)
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "bare") == whole == losses(tmp_path / "parts")
    assert len(whole) == 2 and whole[-1] != whole[0]
    for file in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json"):
        written = [(tmp_path / run / "final" / file).read_bytes() for run in ("whole", "parts")]
        assert written[0] == written[1]
    scheduler = json.loads((final / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    named = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    assert [scheduler[name] for name in named] == [*SHIFT.values()]
    assert scheduler["use_dynamic_shifting"] is True
    theirs = StableDiffusion3Pipeline.from_pretrained(final)
    assert isinstance(theirs.scheduler, FlowMatchEulerDiscreteScheduler)
    mine = LatentDiffusionPipeline.from_pretrained(final)
    drawn = theirs("a ring", generator=generator(), max_sequence_length=12, **CALL).images
    again = mine("a ring", generator=generator(), **CALL).images
    assert (again - drawn).abs().max() <= 1e-6 * drawn.abs().max()
    # And from its folder, all of it: process, target and towers are the folder's.
    more = settings(model=str(final), text=None, transformer=None, vae=None, family=None,
                    process={}, objective={}, duration="1 steps")  # fmt: skip
    train(tmp_path / "more", **more)
    kept = [tmp_path / run / "final" / "scheduler" / "scheduler_config.json" for run in ("whole",
            "more")]  # fmt: skip
    assert kept[0].read_text() == kept[1].read_text()
    moved = [load_file(path.parents[1] / "transformer" / "diffusion_pytorch_model.safetensors")
             for path in kept]  # fmt: skip
    assert moved[0].keys() == moved[1].keys() and not torch.equal(
        moved[0]["proj_out.weight"], moved[1]["proj_out.weight"]
    )


# Kills and processes are asked of SDXL, and of this family what goes on in one.
@pytest.mark.slow
def test_killed_and_in_two_processes(tmp_path, monkeypatch, own_cache):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))
    told = settings(duration="9 steps", batch_size=8, checkpoints={"every": "3 steps", "keep": 1})
    # One process sums the halves of a batch as two do.
    config, run = tree(tmp_path / "killed", **told, micro_batch_size=4), tmp_path / "killed"
    finish(start(config | {"run": str(tmp_path / "whole")}, tmp_path / "a"))
    process = start(config, tmp_path / "b")
    third = run / "checkpoints/images-000000000024"  # written beside the fourth step
    wait_for(lambda: steps(run) >= 4 and third.is_dir(), process)
    process.kill()
    process.wait()
    assert steps(run) < 9
    assert "going on from" in finish(start(config, tmp_path / "b"))
    last = "checkpoints/images-000000000072"
    whole = digests(tmp_path / "whole" / last)
    assert digests(run / last) == whole
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 9
    finish(start(tree(tmp_path / "two", **told), tmp_path / "c", processes=2))
    assert digests(tmp_path / "two" / last) == whole
    assert losses(tmp_path / "two") == pytest.approx(losses(run), rel=1e-6)


def test_weights_in_several_files_are_read_back(tmp_path, monkeypatch):
    """As diffusers writes more than 10 GB."""
    told = settings()
    whole = train(tmp_path / "whole", **told)
    save = SD3Transformer2DModel.save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(
            SD3Transformer2DModel,
            "save_pretrained",
            lambda self, *a, **k: save(self, *a, **k | {"max_shard_size": "20KB"}),
        )
        train(tmp_path / "parts", **told | {"duration": "2 steps"})
        final = train(tmp_path / "parts", **told)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(list((final / "transformer").glob("*.safetensors"))) > 2
    one, other = (read_network(folder / "transformer") for folder in (whole, final))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made(**changes: Any) -> tuple[TrainConfig, Any]:
    config = validate(TrainConfig, tree(Path("run"), **settings(**changes), cache_text=False))
    collection = Collection([ShapesData(count=8, size=16)], config.images)
    return config, (collection, build(config, collection.captions()))


def test_it_begins_as_the_paper_says(own_cache):
    _, (_, model) = made()
    network = model.network
    nothing = {name for name, value in network.named_parameters() if not bool(value.any())}
    zero = {"norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"}
    for name, _ in network.named_parameters():
        layer = name.rpartition(".")[0]
        is_zero = any(layer.endswith(part) for part in zero)
        if name.endswith("weight"):
            assert (name in nothing) == is_zero, name
        elif name.endswith("bias"):
            assert name in nothing, name
    told = network.time_text_embed.timestep_embedder.linear_2.weight
    assert float(told.detach().std()) == pytest.approx(0.02, rel=0.1)
    weight = network.transformer_blocks[0].ff.net[2].weight
    assert float(weight.detach().abs().max()) <= (6 / sum(weight.shape)) ** 0.5
    x = torch.randn(2, 16, 8, 8, generator=generator())
    cond = model.conditioner.encode(["a ring", ""])
    assert cond.tokens.shape == (2, 16 + 12, 32) and cond.pooled.shape == (2, 32)
    assert model.seen_by(x) == RectifiedFlow(math.exp(0.5 + 0.65 * 12 / 60))  # 16 tokens
    assert not bool(model.denoiser(x, torch.tensor(500.0), cond).any())


def test_a_dropped_tower_says_zeros_unless_all_are(own_cache):
    config, (collection, model) = made(text_dropout=[0.5, 0.5, 0.5])
    encoder = Encoder(config, model.codec, model.conditioner, accelerator())
    data, seen = ImageDraws(config, collection, encoder), set()
    nothing = model.conditioner.encode([""])
    for position in range(24):
        item = data[position]
        batch = {name: value[None] for name, value in item.items() if torch.is_tensor(value)}
        cond, told = encoder.condition(batch), tuple(data._told([position])[0])
        seen.add(told)
        if not any(told):
            assert torch.allclose(cond.tokens, nothing.tokens, atol=1e-6)
            assert torch.allclose(cond.pooled, nothing.pooled, atol=1e-6)
            continue
        heard = (cond.tokens[:, :16, :16], cond.tokens[:, :16, 16:], cond.tokens[:, 16:])
        assert tuple(bool(part.any()) for part in heard) == told
        pooled = cond.pooled[:, :16], cond.pooled[:, 16:]
        assert tuple(bool(part.any()) for part in pooled) == told[:2]
    assert {(False,) * 3, (True,) * 3} < seen and len(seen) > 6


def test_towers_that_are_absent(tmp_path):
    final = train(tmp_path / "run", **settings(text=[None, CLIP, None], text_dropout=0.1,
                                               duration="1 steps"))  # fmt: skip
    mine = LatentDiffusionPipeline.from_pretrained(final)
    assert mine.text_encoder is None and mine.text_encoder_3 is None
    tokens = mine.conditioner.encode(["a ring"]).tokens
    assert tokens.shape == (1, 16 + 256, 16) and not bool(tokens[:, 16:].any())
    assert mine("a ring", **CALL).images.isfinite().all()


WRONG = {
    "needs one CLIP text encoder": {"text": [None, None, T5]},
    "text_encoder_3 of the family sd3 is another kind.*kind: t5": {"text": [CLIP, CLIP, CLIP]},
    "must be as wide as those of the CLIP": {"text": [CLIP, CLIP, T5 | {"hidden_size": 16}]},
    "set process.kind to rectified_flow": {"process": {}, "objective": {}},
    "images.size 18 is no multiple of 4": {"images": {"size": 18}},
    "40 pixels are more than the 32": {"images": {"size": 40}},
    "unet: a model of the family sd3 has none, but a transformer": {
        "transformer": None, "unet": {}
    },
    "transformer: a model of the family sd has none, but a unet": {"family": None, "text": CLIP},
    "unet and transformer are two kinds": {"unet": {}},
    "dropout: the transformer": {"dropout": 0.1},
    "textual_inversion: text_encoder_3 is no CLIP": {
        "textual_inversion": {"token": "<x>", "initializer": "ring"}
    },
    "transformer.single_layers: the transformer of the family sd3 has no choice of": {
        "transformer": {"heads": 2, "head_dim": 8, "single_layers": 1}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(validate(TrainConfig, tree(Path("run"), **settings(**WRONG[message]))), [], meta=True)
    assert "\n" not in str(caught.value)


def test_the_lora_config_has_what_it_names():
    config = load(TrainConfig, ROOT / "configs" / "sd3_lora.yaml", ["data.path=x"])
    assert config.learns == ("transformer",) and config.lora is not None
    _, (_, model) = made()
    ends = {name.rpartition("attn.")[2] for name, _ in model.network.named_modules()}
    assert config.lora.targets is None and len(model.family.targets) == 8
    assert {target.removeprefix("attn.") for target in model.family.targets} <= ends
