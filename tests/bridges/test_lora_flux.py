"""LoRA of Flux.1 in ours and in stock ``FluxPipeline``: diffusers' files, kohya's and ComfyUI's."""

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_flux
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.formats import lora
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from loras import apart, short
from runs import accelerator

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "output_type": "latent",
    "height": 16,
    "width": 16,
}


def ours() -> Any:
    return LatentDiffusionPipeline(**tiny_flux.components(), unet=None)


def stock() -> Any:
    return FluxPipeline(**tiny_flux.components())


def draw(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    told = {**CALL, "generator": torch.Generator().manual_seed(0)}
    if isinstance(pipe, LatentDiffusionPipeline):
        return pipe("two dogs", **told).images
    packed = pipe("two dogs", **told, max_sequence_length=tiny_flux.LENGTH).images
    return FluxPipeline._unpack_latents(packed, 16, 16, 2)


def effect(pipe: Any, source: Any) -> Tensor:
    pipe.load_lora_weights(source)
    return draw(pipe)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return draw(stock())


def test_the_config_trains_and_stock_draws_the_same(own_cache, tmp_path, plain):
    base = tmp_path / "base"
    ours().save_pretrained(base)
    both = "train=[transformer, text_encoder]"
    final = text_to_image.train(short("flux_lora", base, tmp_path / "run", both), accelerator())
    names = load_file(final / lora.FILE)
    assert {name.partition(".")[0] for name in names} == {"transformer", "text_encoder"}
    assert any("single_transformer_blocks.0.attn.to_q" in name for name in names)
    mine, theirs = effect(ours(), final), effect(stock(), final)
    assert apart(mine, theirs) <= 1e-6 and apart(mine, plain) > 1e-3
    with pytest.raises(ConfigError, match="a T5EncoderModel, text_encoder_2, can have no LoRA"):
        build(short("flux_lora", base, tmp_path / "run", "train=[text_encoder_2]"), [], meta=True)
    of_t5 = {f"text_encoder_2.encoder.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    with pytest.raises(
        ValueError, match="a text_encoder_2, and this model's, a T5EncoderModel, ca"
    ):
        ours().load_lora_weights(of_t5)


MODULES = {  # of kohya's files; rank, inputs and outputs
    "double_blocks_0_img_attn_qkv": (4, 16, 48),
    "double_blocks_1_txt_attn_qkv": (6, 16, 48),
    "double_blocks_1_img_attn_proj": (4, 16, 16),
    "double_blocks_0_txt_mlp_2": (4, 64, 16),
    "double_blocks_0_img_mod_lin": (4, 16, 96),
    "single_blocks_0_linear2": (4, 80, 16),
    "single_blocks_0_modulation_lin": (4, 16, 48),
}


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=noise)

    return {name: (drawn(r, i), drawn(o, r)) for name, (r, i, o) in MODULES.items()}


def kohya() -> dict[str, Tensor]:
    found = {}
    for name, (down, up) in pairs().items():
        stem = f"lora_unet_{name}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found[f"{stem}.alpha"] = torch.tensor(3.0)
    stem = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj"
    width = tiny_flux.WIDTH
    return found | {
        f"{stem}.lora_down.weight": torch.full((2, width), 0.2),
        f"{stem}.lora_up.weight": torch.full((width, 2), 0.2),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def comfy() -> dict[str, Tensor]:
    """With the names of Black Forest Labs' own code."""
    found = {}
    for name, (down, up) in pairs().items():
        blocks, number, rest = name.split("_")[0], name.split("_")[2], name.split("_", 3)[3]
        rest = rest.replace("attn_", "attn.").replace("mlp_", "mlp.").replace("mod_", "mod.")
        stem = (
            f"diffusion_model.{blocks}_blocks.{number}.{rest.replace('modulation_', 'modulation.')}"
        )
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found[f"{stem}.alpha"] = torch.tensor(3.0)
    return found


def mixture() -> dict[str, Tensor]:
    """kohya's with diffusers' names of layers, as OneTrainer writes them."""
    down, up = pairs()["double_blocks_1_img_attn_proj"]
    stem = "lora_transformer_transformer_blocks_1_attn_to_out_0"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(3.0)}  # fmt: skip


def toolkit() -> dict[str, Tensor]:
    """ai-toolkit's, which are diffusers' without peft's config."""
    down, up = pairs()["double_blocks_1_img_attn_proj"]
    stem = "transformer.transformer_blocks.1.attn.to_out.0"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


@pytest.mark.parametrize("make", [kohya, comfy, mixture, toolkit])
def test_files_of_others_draw_what_they_draw_in_stock(tmp_path, plain, make):
    save_file(make(), tmp_path / "x.safetensors")
    mine, theirs = (effect(pipe, tmp_path / "x.safetensors") for pipe in (ours(), stock()))
    assert apart(theirs, plain) > 1e-3 and apart(mine, theirs) <= 1e-6


def test_a_repository_of_the_hub_is_read_the_same_way(monkeypatch, plain):
    monkeypatch.setattr(lora_pipeline, "_fetch_state_dict", lambda **asked: (kohya(), None))
    mine, theirs = (effect(pipe, "someone/a-lora") for pipe in (ours(), stock()))
    assert apart(theirs, plain) > 1e-3 and apart(mine, theirs) <= 1e-6


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(2, 2)}, "cannot read"),
        ({"lora_unet_img_in.dora_scale": torch.ones(2, 1)}, "DoRA in kohya's format"),
        ({"conv.weight": torch.ones(2)}, "this is no LoRA of a U-Net, a transformer or CLIP"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}") as error:
        ours().load_lora_weights(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
