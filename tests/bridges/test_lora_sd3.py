"""LoRA of a transformer: trained here, drawn by stock ``StableDiffusion3Pipeline``, and back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_sd3
from ldm.cli.lora import LoraFamily, LoraFormat, convert_lora
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.formats import lora
from ldm.formats.single import transformer
from ldm.formats.single.place import from_file, to_file
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
    with pytest.raises(ValueError, match=r"Diffusion 3 alone.*\(ldm lora --family sd3\)$"):
        lora.write(updates, tmp_path / "k.safetensors", "kohya")


# Of kohya's files: rank, inputs and outputs. Block 1 is the last, of whose texts fewer is read.
MODULES = {
    "joint_blocks.0.x_block.attn.qkv": (4, 16, 48),
    "joint_blocks.0.x_block.attn2.qkv": (3, 16, 48),
    "joint_blocks.1.context_block.attn.qkv": (6, 16, 48),
    "joint_blocks.0.context_block.attn.proj": (4, 16, 16),
    "joint_blocks.0.context_block.mlp.fc1": (2, 16, 64),
    "joint_blocks.0.context_block.adaLN_modulation.1": (4, 16, 96),
    "joint_blocks.1.context_block.adaLN_modulation.1": (4, 16, 32),
    "joint_blocks.1.x_block.adaLN_modulation.1": (4, 16, 96),
    "joint_blocks.1.x_block.mlp.fc2": (4, 64, 16),
    "y_embedder.mlp.0": (2, 40, 16),
    "final_layer.adaLN_modulation.1": (4, 16, 32),
}
ALPHA = 3.0


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(2)
    return {
        name: (torch.randn(r, i, generator=noise), 0.3 * torch.randn(o, r, generator=noise))
        for name, (r, i, o) in MODULES.items()
    }


def kohya() -> dict[str, Tensor]:
    found = {}
    for name, (down, up) in pairs().items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return found


def dotted(start: str, down: str, up: str) -> dict[str, Tensor]:
    found = {}
    for name, pair in pairs().items():
        found |= {f"{start}{name}.{down}.weight": pair[0], f"{start}{name}.{up}.weight": pair[1]}
        found[f"{start}{name}.alpha"] = torch.tensor(ALPHA)
    return found


def test_files_of_others_change_the_weights_of_stabilitys_own_layers(tmp_path, plain):
    save_file(kohya(), tmp_path / "x.safetensors")
    mine = effect(ours(), tmp_path / "x.safetensors")
    # Where these layers are, as the single-file format has it.
    pipe = stock()
    network, place = pipe.transformer, transformer.sd3(pipe.transformer.config)
    weights = network.state_dict()
    file = to_file(weights, place)
    for name, (down, up) in pairs().items():
        file[f"{name}.weight"] = file[f"{name}.weight"] + ALPHA / len(down) * up @ down
    network.load_state_dict(from_file({n: x.shape for n, x in weights.items()}, place, file.get))
    theirs = draw(pipe)
    assert apart(theirs, plain) > 1e-2 and apart(mine, theirs) < 1e-5
    read = lora.read(tmp_path / "x.safetensors")
    assert len(read["transformer"]) == len(MODULES) + 3 * 2
    for start, down, up in (
        ("diffusion_model.", "lora_A", "lora_B"),
        ("model.diffusion_model.", "lora_down", "lora_up"),
        ("transformer.", "lora_A", "lora_B"),
    ):
        assert equal(lora.parse(dotted(start, down, up)), read)
    down, up = pairs()["joint_blocks.0.context_block.attn.proj"]
    stem = "lora_transformer_transformer_blocks_0_attn_to_add_out"
    one = lora.parse({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    assert torch.equal(one["transformer"]["transformer_blocks.0.attn.to_add_out"].up, up)
    lora.write(read, tmp_path / "again.safetensors", "kohya", family="sd3")
    again, first = load_file(tmp_path / "again.safetensors"), kohya()
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)


def test_what_is_written_for_others_is_read_again(tmp_path):
    pipe, updates = ours(), {}
    for part, targets in zip(PARTS, (pipe.family.targets, ["q_proj"], ["out_proj"]), strict=True):
        network = getattr(pipe, part)
        attach(network, targets, rank=4, alpha=0.75, dora=part == "transformer")
        shake(network)
        updates[part] = collect(network)
    before = draw(pipe)
    source, out = lora.write(updates, tmp_path / "ours"), tmp_path / "k.safetensors"
    convert_lora(source, out, LoraFormat.kohya, LoraFamily.sd3)
    names = {name.partition(".")[0] for name in load_file(out)}
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj" in names
    assert "lora_unet_joint_blocks_1_context_block_attn_qkv" in names
    assert equal(lora.read(out), lora.read(source))
    assert apart(effect(ours(), out), before) <= 1e-6


QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{QKV}_v.alpha": torch.ones(())}, "is of no LoRA for the transformer of"),
        ({f"{QKV}.alpha": torch.ones(())}, "joint_blocks_0_x_block_attn_qkv lacks its down"),
        (
            {
                f"{QKV}.lora_{k}.weight": torch.ones(s)
                for k, s in (("down", (2, 4)), ("up", (4, 2)))
            },
            r"\(2, 4\) and \(4, 2\) are no update of queries, keys and values",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}") as error:
        lora.read(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


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
    some = {"transformer": {"transformer_blocks.0.attn.to_q": UPDATE}}
    with pytest.raises(ValueError, match="x_block_attn_qkv: kohya's format has .* as one, and"):
        lora.to_kohya(some, family="sd3")
    with pytest.raises(ValueError, match="this is a LoRA of a U-Net, which"):
        lora.to_kohya({"unet": {"mid_block.q": UPDATE}}, family="sd3")


def test_the_default_targets_are_those_of_the_family():
    unet = validate(TrainConfig, tree(Path("run"), lora={"rank": 2}))
    model = build(unet, ["a"], meta=True)
    assert model.family.targets == ("to_q", "to_k", "to_v", "to_out.0")
    adapted = {name.rpartition("attn")[2][2:] for name in collect(model.network)}
    assert adapted == {*model.family.targets}
