"""The full-size configs have the published number of parameters, to the parameter."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.families.build import build, parameters
from runs import ROOT

CLIP_L, CLIP_H, CLIP_BIG_G = 123_060_480, 340_387_840, 694_659_840
T5_XXL = 4_762_310_656
SD3_TOWERS = {
    "text_encoder": 123_650_304,  # with its projection
    "text_encoder_2": CLIP_BIG_G,
    "text_encoder_3": T5_XXL,
}
SDXL: dict[str, Any] = dict(
    sample_size=128,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    projection_class_embeddings_input_dim=2816,
)
REFINER = SDXL | dict(
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)
"""As the published folders have them."""


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("stable_diffusion_1", {"unet": 859_520_964, "text_encoder": CLIP_L}),
        ("stable_diffusion_2", {"unet": 865_910_724, "text_encoder": CLIP_H}),
        (
            "sdxl",
            {"unet": 2_567_463_684, "text_encoder": CLIP_L, "text_encoder_2": CLIP_BIG_G},
        ),
        ("sdxl_refiner", {"unet": 2_259_526_660, "text_encoder_2": CLIP_BIG_G}),
        ("sd3", {"transformer": 2_028_328_000, **SD3_TOWERS}),
        ("sd35_medium", {"transformer": 2_243_171_520, **SD3_TOWERS}),
        ("sd35_large", {"transformer": 8_056_627_520, **SD3_TOWERS}),
        (
            "flux_dev",
            {"transformer": 11_901_408_320, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
        ),
    ],
)
def test_parameters_of_the_published_models(name, counts):
    config = load(TrainConfig, ROOT / "configs" / f"{name}.yaml")
    model = build(config, [], meta=True)
    found = {part: parameters(network) for part, network in model.networks.items()}
    autoencoder = 83_819_683 if name.startswith(("sd3", "flux")) else 83_653_863
    assert found == counts | {"vae": autoencoder} and list(found)[0] == next(iter(counts))
    assert all(p.is_meta for p in model.network.parameters())
    published = {"sdxl": SDXL, "sdxl_refiner": REFINER}.get(name)
    if published is not None:
        with torch.device("meta"):
            stock = UNet2DConditionModel(**published)
        assert shapes(model.networks["unet"]) == shapes(stock)
        same = {key: model.networks["unet"].config[key] for key in published}
        assert same == {**published, "sample_size": 128}
