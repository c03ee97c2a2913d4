"""A family of models is one file: this one trains, caches, resumes, validates, saves, and draws."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from launched import losses
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families import FAMILIES, Family, Tower
from ldm.families.build import build
from ldm.families.model import Model
from ldm.pipeline import LatentDiffusionPipeline
from runs import train, tree


class Toy(Family):
    """A small transformer that reads two text towers one behind the other."""

    name = "toy"
    network = "transformer"
    towers = (
        Tower("text_encoder", "tokenizer", CLIPTextModel),
        Tower("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection, -2, "text_embeds"),
    )
    zeros = True
    reads = PixArtTransformer2DModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        return parts.get("transformer") is not None

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        channels, side, _ = model.codec.shape(config.images.size, config.images.size)
        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=channels,
            out_channels=channels,
            num_layers=1,
            cross_attention_dim=16,
            caption_channels=model.networks["text_encoder"].config.hidden_size,
            sample_size=side,
            patch_size=2,
            use_additional_conditions=False,
        )

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        pass

    def join(self, said: Sequence[Condition], networks: Mapping[str, Any]) -> Condition:
        tokens = torch.cat([cond.tokens for cond in said], 1)
        return Condition(tokens, torch.cat([cond.mask for cond in said], 1), said[-1].pooled)

    def call(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return network(x_t, cond.tokens, timestep.expand(len(x_t))).sample


@pytest.fixture(autouse=True)
def family(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Toy())


def settings(**changes: Any) -> dict[str, Any]:
    text = {"vocab_size": 600, "max_length": 16, "hidden_size": 32, "intermediate_size": 64,
            "layers": 2, "heads": 2}  # fmt: skip
    validation = {"every": "2 steps", "images": 3, "levels": 2, "steps": 2, "prompts": ["a ring"]}
    return {"family": "toy", "text": [text, text | {"max_length": 12}], "duration": "2 steps",
            "unet": None, "transformer": {}, "validation": validation, **changes}  # fmt: skip


def test_it_trains_caches_resumes_validates_saves_and_draws(tmp_path):
    final = train(tmp_path / "whole", **settings(text_dropout=[0.3, 0.3]))
    index = json.loads((final / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
    assert "unet" not in index and index["_class_name"] == "LatentDiffusionPipeline"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 1

    told = settings(text_dropout=[0.3, 0.3], cache_latents=False, cache_text=False)
    train(tmp_path / "bare", **told)
    assert losses(tmp_path / "bare") == losses(tmp_path / "whole")
    train(tmp_path / "parts", **settings(text_dropout=[0.3, 0.3], duration="1 steps"))
    train(tmp_path / "parts", **settings(text_dropout=[0.3, 0.3]))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    pipe = LatentDiffusionPipeline.from_pretrained(final)
    assert pipe.family.name == "toy"
    call = dict(num_inference_steps=2, output_type="pt", seed=0)
    drawn = pipe("a ring", **call).images
    assert drawn.shape == (1, 3, 16, 16) and bool(drawn.isfinite().all())
    pipe.save_pretrained(tmp_path / "again")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again("a ring", **call).images, drawn)

    # Fine-tuned from its folder, and by a pattern.
    more = settings(model=str(final), transformer=None, text=None, vae=None, family=None)
    train(tmp_path / "more", **more, train=["unet.*attn2*"])


def test_what_is_no_family_or_no_part_of_it(tmp_path):
    def made(**changes: Any) -> Model:
        config = validate(TrainConfig, tree(Path("run"), **settings(**changes)))
        return build(config, ["a"], meta=True)

    with pytest.raises(ConfigError, match="family: 'tey' is none of .*, sdxl, toy"):
        made(family="tey")
    with pytest.raises(ConfigError, match="text: 3 entries, and the family toy has 2 text"):
        made(text=[{}, {}, {}])
    with pytest.raises(ConfigError, match="a model of the family sd has no text_encoder_2, but un"):
        made(family="sd", text={"hidden_size": 32, "heads": 2}, transformer=None,
             unet={"block_out_channels": [32]}, train=["text_encoder_2"])  # fmt: skip
    assert list(made().networks) == ["transformer", "text_encoder", "text_encoder_2", "vae"]
