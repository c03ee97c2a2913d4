"""Flux.1 trained: from random init and from its folder, cached texts or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from launched import losses
from ldm.config.loader import load, validate
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.pipeline import LatentDiffusionPipeline
from runs import ROOT, train, tree

CLIP = {"vocab_size": 600, "max_length": 16, "hidden_size": 16, "intermediate_size": 32,
        "layers": 1, "heads": 2}  # fmt: skip
T5 = {"kind": "t5", "vocab_size": 600, "max_length": 12, "hidden_size": 32,
      "intermediate_size": 32, "layers": 1, "heads": 2, "head_dim": 8}  # fmt: skip
SHIFT = {"base": 0.5, "max": 1.15, "from": 4, "to": 64}
CALL: dict[str, Any] = dict(num_inference_steps=2, output_type="latent")


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "family": "flux", "text": [CLIP, T5], "unet": None,
        "vae": {"latent_channels": 16, "quant_conv": False},
        "transformer": {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 8,
                        "guidance": True},
        "process": {"kind": "rectified_flow", "shift": SHIFT},
        "objective": {"target": "velocity", "times": "logit_normal"},
        "optimizer": {"lr": 1e-2}, "duration": "2 steps", **changes,
    }  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(**changes: Any) -> Any:
    return build(validate(TrainConfig, tree(Path("run"), **settings(**changes))), [], meta=True)


def test_caches_change_no_bit_and_stock_opens_the_folder(tmp_path):
    validation = {"every": "2 steps", "images": 1, "levels": 2, "steps": 2, "guidance": 1.0,
                  "prompts": ["a ring"]}  # fmt: skip
    final = train(tmp_path / "whole", **settings(), validation=validation)
    train(tmp_path / "bare", **settings(), cache_text=False)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 2 and losses(tmp_path / "bare") == whole
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (final / file).read_bytes() == (tmp_path / "bare" / "final" / file).read_bytes()
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 1
    theirs = FluxPipeline.from_pretrained(final)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.transformer.config.axes_dims_rope == [4, 2, 2]
    mine = LatentDiffusionPipeline.from_pretrained(final)
    assert mine.sampling_defaults.guidance_scale == 1.0
    packed = theirs("a ring", height=16, width=16, generator=generator(), guidance_scale=1.0,
                    max_sequence_length=12, **CALL).images  # fmt: skip
    drawn = FluxPipeline._unpack_latents(packed, 16, 16, 2)
    again = mine("a ring", generator=generator(), **CALL).images  # 16 x 16, as it learnt
    assert (again - drawn).abs().max() <= 1e-6 * drawn.abs().max()
    more = settings(model=str(final), text=None, transformer=None, vae=None, family=None,
                    process={}, objective={}, duration="1 steps")  # fmt: skip
    train(tmp_path / "more", **more)
    kept = [tmp_path / run / "final" / "scheduler" / "scheduler_config.json"
            for run in ("whole", "more")]  # fmt: skip
    assert kept[0].read_text() == kept[1].read_text()


def test_training_tells_the_network_a_guidance_of_1(own_cache):
    config = validate(TrainConfig, tree(Path("run"), **settings(), cache_text=False))
    model = build(config, ["a ring"])
    for parameter in model.network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator())
    x, cond = torch.randn(2, 16, 8, 8, generator=generator()), model.conditioner.encode(["a", "b"])
    assert cond.tokens.shape == (2, 12, 32) and cond.pooled.shape == (2, 16)

    def said(**extra: torch.Tensor) -> torch.Tensor:
        cond.extra.clear()
        cond.extra.update(extra)
        return model.denoiser(x, torch.tensor(500.0), cond)

    assert torch.equal(said(), said(guidance=torch.ones(2)))
    assert not torch.allclose(said(), said(guidance=torch.full((2,), 3.5)))
    assert model.seen_by(x).shift == pytest.approx(2.7182818 ** (0.5 + 0.65 * 12 / 60))


def test_the_network_begins_at_zero():
    model = build(validate(TrainConfig, tree(Path("run"), **settings(), cache_text=False)), ["a"])
    network = model.network
    cond = model.conditioner.encode(["a ring", ""])
    x = torch.randn(2, 16, 8, 6, generator=generator())
    assert not bool(model.denoiser(x, torch.tensor(500.0), cond).any())
    assert bool(network.single_transformer_blocks[0].proj_mlp.weight.any())
    assert not bool(network.single_transformer_blocks[0].norm.linear.weight.any())


WRONG = {
    "text: the family flux needs a CLIP and a T5; there is no text_encoder_2": {
        "text": [CLIP, None]
    },
    "set process.kind to rectified_flow": {"process": {}, "objective": {}},
    "images.size 18 is no multiple of 4": {"images": {"size": 18}},
    "transformer.qk_norm: the transformer of the family flux has no choice": {
        "transformer": {"heads": 2, "head_dim": 8, "qk_norm": True}
    },
    "transformer.head_dim 7: an even number, 6 at least": {
        "transformer": {"heads": 2, "head_dim": 7}
    },
    "text: 3 entries, and the family flux has 2 text encoders": {"text": [CLIP, CLIP, T5]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as caught:
        made(**WRONG[message])
    assert "\n" not in str(caught.value)


def test_the_configs_are_of_the_family():
    config = load(TrainConfig, ROOT / "configs" / "flux_dev.yaml", [])
    model = build(config, [], meta=True)
    assert model.family.name == "flux" and model.network.config.axes_dims_rope == (16, 56, 56)
    towers = model.conditioner.towers
    assert [tower.length for tower in towers.values()] == [77, 512]
    assert model.process.seen_at(4096).shift == pytest.approx(2.7182818**1.15)
    asked = load(TrainConfig, ROOT / "configs" / "flux_lora.yaml", [])
    assert asked.learns == ("transformer",) and asked.lora is not None
