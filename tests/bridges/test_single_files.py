"""Files that stock's ``from_single_file`` opens, and those of its layout that this library opens:
the same weights, and the same pictures.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import create_unet_diffusers_config_from_ldm
from safetensors.torch import load_file, save_file

import tiny
import tiny_sd3
import tiny_sdxl
from ldm.formats.single import original_config
from ldm.formats.single.families import KINDS
from ldm.formats.single.write import write
from ldm.pipeline import LatentDiffusionPipeline

MODELS: dict[str, tuple[Any, type]] = {
    "sd1": (tiny.components, StableDiffusionPipeline),
    "sd2": (tiny.second, StableDiffusionPipeline),
    "sdxl": (tiny_sdxl.components, StableDiffusionXLPipeline),
    "sdxl-refiner": (lambda: tiny_sdxl.components(refiner=True), StableDiffusionXLImg2ImgPipeline),
}


def same(mine: Any, theirs: Any) -> None:
    for name, network in theirs.components.items():
        if isinstance(network, torch.nn.Module):
            weights = getattr(mine, name).state_dict()
            for key, value in network.state_dict().items():
                assert torch.equal(weights[key], value), f"{name}.{key}"


@pytest.mark.parametrize("name", MODELS)
def test_stock_opens_a_file(tmp_path, name):
    components, cls = MODELS[name]
    refines = {"requires_aesthetics_score": True} if name == "sdxl-refiner" else {}
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    LatentDiffusionPipeline(**components() | refines).save_pretrained(folder)
    write(folder, file, kind="none")
    read = cls.from_single_file(str(file), config=str(folder), torch_dtype=torch.float32)
    opened = cls.from_pretrained(folder, torch_dtype=torch.float32)
    same(read, opened)
    if name != "sdxl-refiner":
        pictures = []
        for pipe in (read, opened):
            asked = dict(num_inference_steps=2, height=16, width=16, output_type="np")
            generator = torch.Generator().manual_seed(0)
            pictures.append(tiny.aligned(pipe)("a red apple", generator=generator, **asked).images)
        assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 0.01
    # Without what this library says in the header, as another program writes it.
    tensors, bare = load_file(file), tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    same(LatentDiffusionPipeline.from_single_file(bare, config=folder), opened)


def test_stock_opens_a_transformer(tmp_path: Path) -> None:
    """Its text encoders stock takes for those of Stable Diffusion 3, and Flux has a fixed width."""
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    LatentDiffusionPipeline(**{"unet": None} | tiny_sd3.components()).save_pretrained(folder)
    write(folder, file, kind="none")
    read = SD3Transformer2DModel.from_single_file(
        str(file), config=str(folder), subfolder="transformer"
    )
    theirs = SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict()
    assert theirs.keys() == read.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in read.state_dict().items())


PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    },
    "vae": {
        "latent_channels": 4, "scaling_factor": 0.18215, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    },
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_stock_reads_the_config_of_a_file(name):
    """The YAML that A1111 needs says the shape and the prediction of the model."""
    second = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
              "use_linear_projection": True}  # fmt: skip
    unet = PUBLISHED["unet"] | (second if name == "sd2" else {})
    kind = next(kind for kind in KINDS if kind.name == name)
    text = original_config.text(kind, PUBLISHED | {"unet": unet})
    assert original_config.predicts_v(text)
    checkpoint = {"model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, 4, 3, 3)}
    read = create_unet_diffusers_config_from_ldm(yaml.safe_load(text), checkpoint)
    assert {key: read[key] for key in unet} == unet
