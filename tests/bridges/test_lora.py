"""One LoRA file, two pipelines: ours and stock ``StableDiffusionPipeline`` draw the same picture.

The reference is a third thing: the networks that the adapters were put into, as in a training.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from ldm.formats import lora
from ldm.formats.lora import Lora
from ldm.models.lora import Update, attach, collect
from ldm.pipeline import LatentDiffusionPipeline
from loras import equal, shake

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    # Convolutions (3x3 and 1x1) and layers of every other kind besides attention.
    "unet": (*ATTENTION, "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1"),
}


def stock() -> Any:
    pipe = StableDiffusionPipeline(
        **tiny.components(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    latents = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    texts = ["a red heart", "a slice of pizza"]
    return pipe(texts, latents=latents, output_type="np", num_inference_steps=3).images


def adapted(dora: bool, parts: tuple[str, ...] = ("unet", "text_encoder")) -> tuple[Any, Lora]:
    """A pipeline with adapters in its networks, alpha 3 at rank 4, and their updates."""
    pipe, updates = tiny.pipeline(), {}
    for part in parts:
        network = getattr(pipe, part)
        attach(network, TARGETS[part], rank=4, alpha=3.0, dora=dora)
        shake(network)
        updates[part] = collect(network.eval())
    return pipe, updates


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return draw(tiny.pipeline())


# What DoRA adds is asked of SDXL's networks in test_lora_sdxl.
@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="lora"), pytest.param(True, id="dora", marks=pytest.mark.slow)],
)
def trained(request: pytest.FixtureRequest, plain: np.ndarray) -> tuple[np.ndarray, Lora]:
    """The picture of the adapted networks, and the adapters."""
    pipe, updates = adapted(request.param)
    picture = draw(pipe)
    assert np.abs(picture - plain).max() > 0.05  # or every comparison below would be with nothing
    return picture, updates


def effect(pipe: Any, source: Any) -> np.ndarray:
    pipe.load_lora_weights(source)
    return draw(pipe)


# -- diffusers' format --


def test_our_file_in_stock_and_in_ours(trained: tuple[np.ndarray, Lora], tmp_path: Path) -> None:
    picture, updates = trained
    assert lora.write(updates, tmp_path).name == "pytorch_lora_weights.safetensors"
    assert equal(lora.read(tmp_path), updates)
    assert np.array_equal(effect(stock(), tmp_path), picture)
    assert np.array_equal(effect(tiny.pipeline(), tmp_path), picture)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lora_of_one_network(part: str, plain: np.ndarray, tmp_path: Path, caplog: Any) -> None:
    pipe, updates = adapted(False, (part,))
    picture = draw(pipe)
    assert np.abs(picture - plain).max() > 0.01
    lora.write(updates, tmp_path / "one.safetensors")
    ours = tiny.pipeline()
    assert np.array_equal(effect(ours, tmp_path), picture)
    assert not caplog.records  # stock warns of the other network
    assert np.array_equal(effect(stock(), tmp_path), picture)
    ours.load_lora_weights(lora.to_kohya(adapted(False)[1]))  # one name in both networks
    assert ours.get_list_adapters()["unet"][-1] == ours.get_list_adapters()["text_encoder"][-1]


def test_a_text_encoder_lora_outside_attention_loads_in_stock(tmp_path: Path) -> None:
    # Under peft's names stock finds no format in it ("Could not automatically infer").
    pipe = tiny.pipeline()
    attach(pipe.text_encoder, ["fc1", "fc2"], rank=2, alpha=1.0, dora=False)
    shake(pipe.text_encoder)
    lora.write({"text_encoder": collect(pipe.text_encoder)}, tmp_path)
    assert np.array_equal(effect(stock(), tmp_path), draw(pipe))


def test_what_stock_saves_loads_in_ours(tmp_path: Path) -> None:
    # As diffusers' own training scripts save, with and without the metadata that keeps alpha.
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe = stock()
    states, configs = {}, {}
    for part in ("unet", "text_encoder"):
        network = getattr(pipe, part)
        attach(network, TARGETS[part][:4], rank=4, alpha=3.0, dora=False)
        shake(network)
        states[part] = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        configs[part] = network.peft_config["default"].to_dict()
    folders = tmp_path / "with", tmp_path / "without"
    for folder in folders:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            states["unet"],
            states["text_encoder"],
            **(
                {f"{part}_lora_adapter_metadata": config for part, config in configs.items()}
                if folder is folders[0]
                else {}
            ),
        )
    picture = draw(pipe.to("cpu"))
    assert np.array_equal(effect(tiny.pipeline(), folders[0]), picture)
    found = effect(tiny.pipeline(), folders[1])
    assert np.array_equal(found, effect(stock(), folders[1]))
    assert np.abs(found - picture).max() > 1e-3  # alpha is lost, in stock as in ours


def test_tensors_instead_of_a_file(trained: tuple[np.ndarray, Lora]) -> None:
    picture, updates = trained
    assert np.array_equal(effect(tiny.pipeline(), lora.to_kohya(updates)), picture)


# -- kohya's format --


def test_our_file_as_kohyas(trained: tuple[np.ndarray, Lora], tmp_path: Path) -> None:
    picture, updates = trained
    file = lora.write(updates, tmp_path / "k.safetensors", "kohya")
    keys = load_file(file)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert float(keys[f"{stem}.alpha"]) == 3.0 and len(keys[f"{stem}.lora_down.weight"]) == 4
    assert equal(lora.read(file), updates)
    assert np.array_equal(effect(tiny.pipeline(), file), picture)


def test_our_kohya_file_in_stock(tmp_path: Path) -> None:
    pipe, updates = adapted(False)
    file = lora.write(updates, tmp_path / "k.safetensors", "kohya")
    assert np.array_equal(effect(stock(), file), draw(pipe))


def test_stock_leaves_dora_out_of_kohyas_files_and_ours_does_not(tmp_path: Path) -> None:
    pipe, updates = adapted(True)
    file = lora.write(updates, tmp_path / "k.safetensors", "kohya")
    assert np.abs(effect(stock(), file) - draw(pipe)).max() > 1e-3
    # What else diffusers' reader makes of the names is what we make of them.
    names = _convert_non_diffusers_lora_to_diffusers(load_file(file))[0]
    assert sum("lora_magnitude_vector" in name for name in names) == sum(map(len, updates.values()))


def test_kohya_to_diffusers_to_kohya(trained: tuple[np.ndarray, Lora], tmp_path: Path) -> None:
    picture, updates = trained
    first = lora.write(updates, tmp_path / "1.safetensors", "kohya")
    second = lora.write(lora.read(first), tmp_path / "2")
    third = lora.write(lora.read(second), tmp_path / "3.safetensors", "kohya")
    assert equal(lora.read(second), updates)
    one, other = load_file(first), load_file(third)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert np.array_equal(effect(stock(), tmp_path / "2"), picture)


def uneven(alphas: bool) -> tuple[Lora, Callable[[Any], None]]:
    """Every module its own rank (and alpha), and what writes the very same W into a pipeline."""
    networks = tiny.components()
    generator = torch.Generator().manual_seed(3)
    updates: dict[str, dict[str, Update]] = {}
    for part in ("unet", "text_encoder"):
        layers = [
            (n, m.weight.shape)
            for n, m in networks[part].named_modules()
            if n.endswith((*ATTENTION, *TARGETS["text_encoder"][:4])) and isinstance(m, nn.Linear)
        ]
        updates[part] = {
            name: Update(
                0.3 * torch.randn(1 + number % 3, shape[1], generator=generator),
                0.3 * torch.randn(shape[0], 1 + number % 3, generator=generator),
                alpha=float(1 + number % 4) if alphas else 2.0,
            )
            for number, (name, shape) in enumerate(layers)
        }

    def bake(pipe: Any) -> None:
        for part, modules in updates.items():
            for name, u in modules.items():
                weight = getattr(pipe, part).get_submodule(name).weight
                weight.data += u.alpha / u.rank * (u.up @ u.down)

    return updates, bake


@pytest.mark.parametrize("alphas", [False, True], ids=["ranks", "ranks and alphas"])
def test_ranks_and_alphas_of_every_module(alphas: bool, plain: np.ndarray, tmp_path: Path) -> None:
    updates, bake = uneven(alphas)
    assert len({u.rank for u in updates["unet"].values()}) == 3
    folder, kohya = tmp_path / "d", tmp_path / "k.safetensors"
    lora.write(updates, folder)
    lora.write(updates, kohya, "kohya")
    assert equal(lora.read(folder), updates) and equal(lora.read(kohya), updates)
    picture = effect(tiny.pipeline(), folder)
    assert np.abs(picture - plain).max() > 0.05
    assert np.array_equal(effect(tiny.pipeline(), kohya), picture)
    assert np.array_equal(effect(stock(), folder), picture)
    if not alphas:
        assert np.array_equal(effect(stock(), kohya), picture)
    baked = tiny.pipeline()
    bake(baked)  # W0 x + s B (A x) against (W0 + s B A) x: another order of the same sums
    assert np.abs(draw(baked) - picture).max() < 1e-4


def test_alpha_that_float32_does_not_hold(tmp_path: Path) -> None:
    updates = {"unet": {"mid.to_q": Update(torch.ones(2, 3), torch.ones(4, 2), alpha=0.1)}}
    for to in ("kohya", "diffusers"):
        file = lora.write(updates, tmp_path / f"{to}.safetensors", to)
        assert lora.read(file)["unet"]["mid.to_q"].alpha == 0.1


def test_every_name_survives_kohyas_underscores() -> None:
    networks = tiny.components()
    count = 0
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, module in networks[part].named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                stem = prefix + name.replace(".", "_")
                pair = torch.ones(1, 2), torch.ones(2, 1)
                found = lora.parse(
                    {f"{stem}.lora_down.weight": pair[0], f"{stem}.lora_up.weight": pair[1]}
                )
                assert list(found) == [part] and list(found[part]) == [name]
                assert found[part][name].alpha == 1.0  # no alpha: the rank
                count += 1
    assert count > 60


def test_rslora_is_a_larger_alpha() -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(4, 2), "unet.a.lora_B.weight": torch.ones(2, 4)}
    found = lora.parse(tensors, {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True})
    assert found["unet"]["a"].alpha / 4 == 3 / 4**0.5


# -- what users of diffusers do with it --


def test_scale_fuse_unfuse_unload(trained: tuple[np.ndarray, Lora], tmp_path: Path) -> None:
    picture, updates = trained
    lora.write(updates, tmp_path)
    pair = tiny.pipeline(), stock()
    before = [{k: v.clone() for k, v in p.unet.state_dict().items()} for p in pair]
    for pipe in pair:
        pipe.load_lora_weights(tmp_path, adapter_name="mine")
    for step in (
        lambda p: p.set_adapters("mine", 0.3),
        lambda p: p.set_adapters("mine", 1.0),
        lambda p: p.fuse_lora(),
        lambda p: p.unfuse_lora(),
    ):
        for pipe in pair:
            step(pipe)
        ours, theirs = (draw(pipe) for pipe in pair)
        assert np.array_equal(ours, theirs)
    # Adding and taking away in float32 is exact to a rounding of every weight, not to the bit.
    assert 0 < np.abs(ours - picture).max() < 1e-4
    pair[0].unload_lora_weights()
    state = pair[0].unet.state_dict()
    assert state.keys() == before[0].keys()
    assert all((state[k] - before[0][k]).abs().max() < 1e-5 for k in state)


def test_unload_without_fusing_is_exact(plain: np.ndarray, tmp_path: Path) -> None:
    lora.write(adapted(False)[1], tmp_path)
    pipe = tiny.pipeline()
    assert not np.array_equal(effect(pipe, tmp_path), plain)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), plain)


def test_saving_with_adapters(tmp_path: Path, plain: np.ndarray) -> None:
    lora.write(adapted(False)[1], tmp_path / "lora")
    pipe = tiny.pipeline()
    pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"^a pipeline folder has no place for adapters: [^\n]*$"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(ValueError, match="no place for adapters"):  # the text encoder's are loose
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse_lora(components=["text_encoder"])
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path / "model")
    assert np.array_equal(draw(pipe), picture) and pipe.get_list_adapters()  # as it was
    for kind in (LatentDiffusionPipeline, StableDiffusionPipeline):
        again = kind.from_pretrained(tmp_path / "model")
        again.set_progress_bar_config(disable=True)
        # The fused weights themselves are saved; what computed with them was not one matrix.
        assert np.abs(draw(again) - picture).max() <= 1e-6
        assert not again.get_list_adapters()
    assert np.abs(picture - plain).max() > 0.05


def test_the_oldest_layout(tmp_path: Path) -> None:
    """``save_attn_procs`` of diffusers 0.11 to 0.17: a U-Net's attention, without ``unet.``."""
    pipe, updates = tiny.pipeline(), {}
    attach(pipe.unet, ATTENTION, rank=4, alpha=4.0, dora=False)
    shake(pipe.unet)
    updates["unet"] = collect(pipe.unet.eval())
    picture, tensors = draw(pipe), {}
    for name, update in updates["unet"].items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        tensors[f"{block}.processor.{layer}_lora.down.weight"] = update.down
        tensors[f"{block}.processor.{layer}_lora.up.weight"] = update.up
    assert next(iter(tensors)).startswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1.p")
    file = one(tensors, tmp_path)
    assert equal(lora.read(file), updates)
    for source in (file, tensors):
        assert np.array_equal(effect(tiny.pipeline(), source), picture)


# -- what is none --


def one(tensors: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    file = path / "x.safetensors"
    save_file(tensors, file, metadata=metadata or None)
    return file


PAIR = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({"conv.weight": torch.ones(2)}, "this is no LoRA of a U-Net, a transformer or CLIP: it"),
        ({"unet.a.lora_A.weight": torch.ones(2, 3)}, "unet.a lacks its up weight"),
        (
            {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 3)},
            r"unet.a: \(2, 3\) and \(4, 3\) are no pair of low rank",
        ),
        ({"unet.a.lokr_w1": torch.ones(2)}, "unet.a.lokr_w1 is no tensor of a LoRA"),
        ({"lora_unet_a.hada_w1_a": torch.ones(2)}, "unet.a: this is no LoHa: hada_w1_a"),
        ({f"lora_te3_a.{k}": v for k, v in PAIR.items()}, "lora_te3_a.lora_down.weight is of no"),
        (
            {f"lora_te2_a.{k}": v for k, v in PAIR.items()},
            "there are updates of a text_encoder_2, and this model has none$",
        ),
        (
            {f"lora_unet_input_blocks_4_1_proj_in.{k}": v for k, v in PAIR.items()},
            "this U-Net does not have a layer input_blocks_4_1_proj_in$",
        ),
        (
            {f"lora_unet_a.{k}": v for k, v in PAIR.items()}
            | {"lora_unet_a.dora_scale": torch.ones(1, 4)},
            "unet.a: DoRA along inputs",
        ),
    ],
)
def test_a_file_that_is_no_lora_of_ours(
    tensors: dict[str, Tensor], told: str, tmp_path: Path
) -> None:
    file = one(tensors, tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {told}[^\n]*$"):
        tiny.pipeline().load_lora_weights(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pytorch_lora_weights.safetensors, and not one"):
        lora.read(tmp_path)
    pickled = tmp_path / "x.bin"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x.bin is pickled and could run code when it is read; "):
        lora.read(pickled)
    other = pickled.rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x.npz is no .safetensors, and nothing else is read$"):
        lora.read(other)
    broken = tmp_path / "y.safetensors"
    broken.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"y.safetensors cannot be read as safetensors: [^\n]*$"):
        lora.read(broken)
    with pytest.raises(ValueError, match=r"there is no such file or folder$"):
        lora.read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^unet has DoRA in 1 of 2 modules: not in all$"):
        pair = Update(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        lora.to_diffusers({"unet": {"a": pair, "b": replace(pair, magnitude=torch.ones(2))}})


def test_a_lora_of_another_model(tmp_path: Path) -> None:
    _, updates = adapted(False, ("unet",))
    name = next(name for name in updates["unet"] if name.endswith("to_q"))
    update = updates["unet"][name]
    pipe = tiny.pipeline()
    for wrong, told in (
        ({"mid.to_q": update}, "there is no layer mid.to_q"),
        (
            {name: Update(torch.ones(4, 48), update.up, 1.0)},
            rf"{re.escape(name)} is \(32, 32\), its update is for \(32, 48\)",
        ),
    ):
        folder = tmp_path / str(len(told))
        lora.write({"unet": wrong}, folder)
        with pytest.raises(ValueError, match=f"is not for this unet: {told}$"):
            pipe.load_lora_weights(folder)
        assert not pipe.get_list_adapters()
    lora.write(updates, tmp_path / "good")
    pipe.load_lora_weights(tmp_path / "good", adapter_name="a")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        pipe.load_lora_weights(tmp_path / "good", adapter_name="a")
    metadata = json.loads(_header(tmp_path / "good" / lora.FILE)["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 3.0)


def _header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
