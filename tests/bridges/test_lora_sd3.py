"""LoRA of a transformer: trained here, drawn by stock ``StableDiffusion3Pipeline``, and back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import tiny_sd3
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.formats import lora
from ldm.models.lora import Update, attach, collect
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from loras import apart, equal, shake, short
from runs import accelerator, tree

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PARTS = ["transformer", "text_encoder", "text_encoder_2"]
CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}


def ours() -> Any:
    return LatentDiffusionPipeline(**tiny_sd3.components(), unet=None)


def stock() -> Any:
    return StableDiffusion3Pipeline(**tiny_sd3.components())


def draw(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    told = {} if isinstance(pipe, LatentDiffusionPipeline) else {"max_sequence_length": 20}
    generator = torch.Generator().manual_seed(0)
    return pipe("two dogs", generator=generator, **CALL, **told).images


def effect(pipe: Any, source: Any) -> Tensor:
    pipe.load_lora_weights(source)
    return draw(pipe)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return draw(stock())


def test_the_config_trains_saves_loads_and_draws(own_cache, tmp_path, plain):
    base = tmp_path / "base"
    ours().save_pretrained(base)
    config = short("sd3_lora", base, tmp_path / "run", f"train=[{', '.join(PARTS)}]")
    final = text_to_image.train(config, accelerator())
    tensors = load_file(final / lora.FILE)
    assert {name.partition(".")[0] for name in tensors} == {*PARTS}
    targets = {
        name.partition("attn.")[2].partition(".lora")[0] for name in tensors if "attn." in name
    }
    assert {"to_q", "to_out.0", "add_k_proj", "to_add_out"} < targets
    assert not any("attn2" in name or "text_model.text_model" in name for name in tensors)
    read = lora.read(final)
    still = {name for modules in read.values() for name, u in modules.items() if not u.up.any()}
    assert still == {"transformer_blocks.1.attn.add_q_proj"}  # of texts, which end before it
    assert {(u.rank, u.alpha) for modules in read.values() for u in modules.values()} == {(2, 3)}
    pair = [
        kind.from_pretrained(base) for kind in (LatentDiffusionPipeline, StableDiffusion3Pipeline)
    ]
    mine, theirs = (effect(pipe, final) for pipe in pair)
    assert apart(mine, theirs) <= 1e-6 and apart(mine, plain) > 1e-3
    # Going on reads the file back, under the names of the networks.
    both = f"train=[{', '.join(PARTS)}]"
    longer = short("sd3_lora", base, tmp_path / "run", both, "duration=3 steps")
    again = text_to_image.train(longer, accelerator())
    before, after = tensors, load_file(again / lora.FILE)
    assert before.keys() == after.keys() and any(
        not torch.equal(before[k], after[k]) for k in after
    )
    pipe = pair[0]
    pipe.fuse_lora()
    assert apart(draw(pipe), mine) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(draw(pipe), plain) < 1e-4 and not pipe.get_list_adapters()


def test_a_file_of_stock_opens_here(tmp_path, plain):
    pipe, layers, told, updates = stock(), {}, {}, {}
    for part, targets in zip(PARTS, (["to_q", "ff.net.2"], ["q_proj"], ["out_proj"]), strict=True):
        network = getattr(pipe, part)
        attach(network, targets, rank=4, alpha=3.0, dora=False)
        shake(network)
        updates[part] = collect(network)
        state = get_peft_model_state_dict(network)
        keep = part == "transformer"
        layers[f"{part}_lora_layers"] = state if keep else convert_state_dict_to_diffusers(state)
        told[f"{part}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    picture = draw(pipe)
    assert apart(picture, plain) > 1e-3
    for number, kind in enumerate((StableDiffusion3Pipeline, LatentDiffusionPipeline)):
        kind.save_lora_weights(tmp_path / str(number), **layers, **told)
        assert apart(effect(ours(), tmp_path / str(number)), picture) <= 1e-6
    one, other = (load_file(tmp_path / str(number) / lora.FILE) for number in (0, 1))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    file = lora.write(updates, tmp_path / "ours")
    assert equal(lora.read(file), lora.read(tmp_path / "0"))
    assert apart(effect(stock(), tmp_path / "ours"), picture) <= 1e-6
    with pytest.raises(ValueError, match="of a transformer is written in diffusers' format alone$"):
        lora.write(updates, tmp_path / "k.safetensors", "kohya")


UPDATE = Update(torch.ones(2, 4), torch.ones(4, 2), 2.0)


def test_what_has_no_place_is_told_in_one_line(tmp_path):
    told = re.escape("train: a T5EncoderModel, text_encoder_3, can have no LoRA")
    base = tmp_path / "base"
    ours().save_pretrained(base)
    config = short("sd3_lora", base, tmp_path / "run", "train=[text_encoder_3]")
    with pytest.raises(ConfigError, match=f"^{told}.*transformer and text_encoder and text") as e:
        build(config, [], meta=True)
    assert "\n" not in str(e.value)
    pipe = ours()
    for part, name, message in (
        ("unet", "mid_block.q", "there are updates of a unet, and this model has none"),
        ("transformer", "proj_out", "is not for this transformer: proj_out is"),
        ("text_encoder", "text_model.encoder.layers.9.mlp.fc1", "there is no layer text_model.enc"),
    ):
        tensors, _ = lora.to_diffusers({part: {name: UPDATE}})
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tensors)
    late = {f"text_encoder_3.encoder.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    with pytest.raises(ValueError, match=r"or CLIP: it holds text_encoder_3\.encoder"):
        pipe.load_lora_weights(late)
    assert not pipe.get_list_adapters()


def test_the_default_targets_are_those_of_the_family():
    unet = validate(TrainConfig, tree(Path("run"), lora={"rank": 2}))
    model = build(unet, ["a"], meta=True)
    assert model.family.targets == ("to_q", "to_k", "to_v", "to_out.0")
    adapted = {name.rpartition("attn")[2][2:] for name in collect(model.network)}
    assert adapted == {*model.family.targets}
