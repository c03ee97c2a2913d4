"""One LoRA file of SDXL, with updates of both text encoders, in ours and in stock
``StableDiffusionXLPipeline``: in diffusers' format, and in kohya's with sgm's names of blocks.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import tiny
import tiny_sdxl
from ldm.cli import app
from ldm.formats import lora, sgm
from ldm.formats.lora import Lora
from ldm.models.lora import Update, attach, collect
from ldm.pipeline import LatentDiffusionPipeline
from loras import equal, shake

TARGETS = {
    "unet": (
        *("to_q", "attn2.to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut"),
        *("time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"),
        *("time_embedding.linear_1", "add_embedding.linear_2"),
    ),
    # Of kohya's files of text encoders stock reads attention only if out_proj is among it.
    "text_encoder": ("q_proj", "out_proj", "fc1"),
    "text_encoder_2": ("k_proj", "out_proj", "fc2"),
}
CONFIG = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
PAIR = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
UPDATE = Update(PAIR["lora_down.weight"], PAIR["lora_up.weight"], 2.0)


def ours() -> Any:
    return LatentDiffusionPipeline(**tiny_sdxl.components())


def draw(pipe: Any) -> np.ndarray:
    """What the networks of ``pipe`` draw in stock."""
    if isinstance(pipe, LatentDiffusionPipeline):
        parts = {name: pipe.components[name] for name in tiny_sdxl.components()}
        pipe = tiny_sdxl.stock(parts)
    latents = torch.randn(1, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe("a red heart", latents=latents, **how).images.numpy()


def adapted(dora: bool) -> tuple[Any, Lora]:
    pipe, updates = tiny_sdxl.stock(), {}
    for part, targets in TARGETS.items():
        network = getattr(pipe, part)
        attach(network, targets, rank=4, alpha=3.0, dora=dora)
        shake(network)
        updates[part] = collect(network.eval())
    return pipe, updates


def effect(pipe: Any, source: Any) -> np.ndarray:
    pipe.load_lora_weights(source)
    return draw(pipe)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return draw(tiny_sdxl.stock())


# Without DoRA it is asked of SD's networks in test_lora.
@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="lora", marks=pytest.mark.slow), pytest.param(True, id="dora")],
)
def trained(request: pytest.FixtureRequest, plain: np.ndarray) -> tuple[np.ndarray, Lora, bool]:
    pipe, updates = adapted(request.param)
    picture = draw(pipe)
    assert np.abs(picture - plain).max() > 0.05
    return picture, updates, request.param


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-5)


# -- both formats --


def test_diffusers_format(trained: tuple[np.ndarray, Lora, bool], tmp_path: Path) -> None:
    picture, updates, _ = trained
    file = lora.write(updates, tmp_path)
    stem = "text_encoder_2.text_model.encoder.layers.0.mlp.fc2.lora_linear_layer"
    assert f"{stem}.down.weight" in load_file(file)
    assert equal(lora.read(file), updates)
    assert close(effect(tiny_sdxl.stock(), tmp_path), picture)
    assert close(effect(ours(), tmp_path), picture)


def test_kohyas_format(trained: tuple[np.ndarray, Lora, bool], tmp_path: Path) -> None:
    picture, updates, dora = trained
    file = lora.write(updates, tmp_path / "k.safetensors", "kohya")
    stems = {name.partition(".")[0] for name in load_file(file)}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_label_emb_0_2",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "lora_te2_text_model_encoder_layers_2_mlp_fc2",
    } <= stems
    assert not any("down_blocks" in stem or "lora_te_" in stem for stem in stems)
    assert equal(lora.read(file), updates)
    assert close(effect(ours(), file), picture)
    if not dora:  # which stock leaves out of kohya's files
        assert close(effect(tiny_sdxl.stock(), file), picture)


def test_there_and_back(trained: tuple[np.ndarray, Lora, bool], tmp_path: Path) -> None:
    _, updates, _ = trained
    first = lora.write(updates, tmp_path / "1")
    second, third = tmp_path / "2.safetensors", tmp_path / "3"
    for source, out, to in ((first, second, "kohya"), (second, third, "diffusers")):
        run = CliRunner().invoke(app, ["lora", str(source), str(out), "--to", to])
        assert run.exit_code == 0 and "text_encoder_2: 9 modules of rank 4" in run.output
    assert any(name.startswith("lora_unet_middle_block_1_") for name in load_file(second))
    one, other = load_file(first), load_file(third / lora.FILE)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert equal(lora.read(third), updates)


def test_a_file_of_stock(tmp_path: Path) -> None:
    """As diffusers' own script of SDXL saves."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_sdxl.stock()
    layers, told, text = {}, {}, ("q_proj", "out_proj")
    for part in TARGETS:
        network, targets = getattr(pipe, part), ("to_q", "to_k") if part == "unet" else text
        attach(network, targets, rank=4, alpha=3.0, dora=False)
        shake(network)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(network)
        )
        told[f"{part}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    picture = draw(pipe)
    for number, kind in enumerate((StableDiffusionXLPipeline, LatentDiffusionPipeline)):
        kind.save_lora_weights(tmp_path / str(number), **layers, **told)
        names = load_file(tmp_path / str(number) / lora.FILE)
        stem = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
        assert [n for n in names if n.startswith(f"{stem}.")] == [
            f"{stem}.lora_linear_layer.down.weight",
            f"{stem}.lora_linear_layer.up.weight",
        ]
        assert close(effect(ours(), tmp_path / str(number)), picture)


def test_both_names_of_blocks_are_read(tmp_path: Path) -> None:
    """There are kohya files of SDXL with diffusers' names of blocks too."""
    updates = adapted(False)[1]
    of_sgm = lora.to_kohya(updates)
    plain_names = lora.to_kohya({"unet": updates["unet"]}, unet=CONFIG)
    assert all(not sgm.is_one(k.removeprefix("lora_unet_")) for k in plain_names)
    texts = {k: v for k, v in of_sgm.items() if not k.startswith("lora_unet_")}
    assert equal(lora.parse(plain_names | texts), updates)
    twice = of_sgm | dict(list(plain_names.items())[:3])
    with pytest.raises(ValueError, match=r"is there under another name as well$"):
        lora.parse(twice)


# -- names --


def names(network: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def refiner(**changed: Any) -> UNet2DConditionModel:
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    kinds = (plain, cross, cross, plain)
    shape: dict[str, Any] = {
        "block_out_channels": (16,) * 4,
        "layers_per_block": 2,
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "cross_attention_dim": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48,
    }
    return UNet2DConditionModel(**shape | changed)


@pytest.mark.parametrize("which", ["base", "refiner", "one level", "uneven"])
def test_every_layer_has_one_name_in_sgm(which: str) -> None:
    make = {
        "base": tiny_sdxl.unet,
        "refiner": refiner,
        "one level": lambda: refiner(
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        "uneven": lambda: refiner(layers_per_block=(1, 3, 2, 1)),
    }[which]
    with torch.device("meta"):
        network = make()
    layout, found = sgm.Layout.of(network.config), {}
    for name in names(network):
        called = layout.to_sgm(name)
        assert called is not None, name
        stem = called.replace(".", "_")
        assert sgm.is_one(stem) and layout.from_sgm(stem) == name.replace(".", "_")
        found[called] = name
    assert len(found) == len(names(network)) > 20
    if which in ("base", "refiner"):
        unet = network.config
        updates = {"unet": dict.fromkeys(names(network), UPDATE)}
        known = lora.to_kohya(updates)  # it is told from its names which of the two it is
        assert known.keys() == lora.to_kohya(updates, unet).keys()
        for config in (None, unet):
            assert lora.parse(known, unet=config)["unet"].keys() == updates["unet"].keys()
    if which == "refiner":
        assert "output_blocks.2.1.conv" in found and "output_blocks.5.2.conv" in found


def test_the_published_table() -> None:
    """Names as they stand in files that people share, and in SDXL's own checkpoint."""
    base = sgm.PUBLISHED[0]
    for theirs, name in {
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
        "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj": (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
        ),
        "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.3.1.transformer_blocks.1.attn2.to_v": (
            "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v"
        ),
        "output_blocks.8.0.out_layers.3": "up_blocks.2.resnets.2.conv2",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
    }.items():
        assert base.to_sgm(name) == theirs
        assert base.from_sgm(theirs.replace(".", "_")) == name.replace(".", "_")


def one(name: str) -> Mapping[str, Any]:
    return {"unet": {name: UPDATE}}


def test_which_names_are_written() -> None:
    deep = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    shallow = deep.replace("blocks.1.attn1", "blocks.0.attn1")
    for updates, unet, stem in (
        (one(shallow), None, "lora_unet_down_blocks_1_attentions_0"),
        (one(deep), None, "lora_unet_input_blocks_4_1"),
        (one("add_embedding.linear_1"), None, "lora_unet_label_emb_0_0"),
        (
            one(shallow),
            {**CONFIG, "addition_embed_type": "text_time"},
            "lora_unet_input_blocks_3_1",
        ),
        (one(deep), CONFIG, "lora_unet_down_blocks_1_attentions_0"),
        ({**one(shallow), "text_encoder_2": {}}, None, "lora_unet_input_blocks_4_1"),
    ):
        assert next(iter(lora.to_kohya(updates, unet))).startswith(stem)
    second = lora.to_kohya({"text_encoder_2": {"text_projection": UPDATE}})
    assert set(second) == {f"lora_te2_text_projection.{k}" for k in (*PAIR, "alpha")}
    assert list(lora.parse(second)["text_encoder_2"]) == ["text_projection"]


@pytest.mark.parametrize(
    ("updates", "told"),
    [
        (
            one("up_blocks.7.attentions.0.transformer_blocks.1.attn1.to_q"),
            "with a layer up_blocks.7",
        ),
        (one("add_embedding.linear_3"), "with a layer add_embedding.linear_3$"),
        ({"text_encoder_2": {"a_b": UPDATE}}, "text_encoder_2.a_b could not be read back from"),
        (one("class_embedding.linear_1"), "unet.class_embedding.linear_1 could not be read back"),
    ],
)
def test_what_kohyas_files_cannot_say(updates: Lora, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as error:
        lora.write(updates, tmp_path / "k.safetensors", "kohya")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_input_blocks_12_1_proj_in",
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_unet_input_blocks_4_1",
        "lora_unet_input_blocks_4_1_conv",
        "lora_unet_output_blocks_11_1_conv",
        "lora_unet_middle_block_3_proj_in",
        "lora_unet_out_1",
    ],
)
def test_names_that_no_layer_has(stem: str) -> None:
    name = stem.removeprefix("lora_unet_")
    with pytest.raises(ValueError, match=f"^Stable Diffusion XL has no U-Net with a layer {name}$"):
        lora.parse({f"{stem}.{k}": v for k, v in PAIR.items()})


# -- what users of diffusers do with it --


def test_scale_fuse_unfuse_unload(plain: np.ndarray, tmp_path: Path) -> None:
    updates = adapted(False)[1]
    lora.write(updates, tmp_path)
    pair = ours(), tiny_sdxl.stock()
    for pipe in pair:
        pipe.load_lora_weights(tmp_path, adapter_name="mine")
        assert pipe.get_list_adapters() == dict.fromkeys(TARGETS, ["mine"])
    drawn = []
    for step in (
        lambda p: p.set_adapters("mine", {"unet": 0.3, "text_encoder": 0.5, "text_encoder_2": 0.0}),
        lambda p: p.set_adapters("mine", {"unet": 0.3, "text_encoder": 0.5, "text_encoder_2": 1.0}),
        lambda p: p.fuse_lora(),
        lambda p: p.unfuse_lora(),
    ):
        for pipe in pair:
            step(pipe)
        drawn.append(draw(pair[0]))
        assert np.array_equal(drawn[-1], draw(pair[1]))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    pair[0].fuse_lora(components=["unet", "text_encoder"])
    with pytest.raises(ValueError, match="no place for adapters"):  # the second tower's are loose
        pair[0].save_pretrained(tmp_path / "model")
    pair[0].unfuse_lora()
    pair[0].unload_lora_weights()
    assert not pair[0].get_list_adapters() and np.abs(draw(pair[0]) - plain).max() < 1e-4
    for part in TARGETS:
        assert not any(".lora_" in name for name in getattr(pair[0], part).state_dict())


def test_a_model_with_one_tower(tmp_path: Path) -> None:
    """Nothing has changed for it, and it is told what it lacks."""
    pipe = tiny.pipeline()
    assert pipe._lora_loadable_modules == ["unet", "text_encoder"]
    assert ours()._lora_loadable_modules == [*TARGETS]
    with pytest.raises(ValueError, match="text_encoder_2 is not found in"):
        pipe.fuse_lora(components=["text_encoder_2"])
    second = {"text_encoder_2": adapted(False)[1]["text_encoder_2"]}
    for to in ("diffusers", "kohya"):
        file = lora.write(second, tmp_path / f"{to}.safetensors", to)
        told = f"{file}: there are updates of a text_encoder_2, and this model has none"
        with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
            pipe.load_lora_weights(file)
    assert not pipe.get_list_adapters()
