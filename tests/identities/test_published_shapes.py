"""The full-size configs have the published number of parameters, to the parameter, and in one file
the published names of tensors.
"""

import hashlib
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as stock_files
from torch import nn

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.config.shapes import UNetShape
from ldm.families.build import build, parameters
from ldm.families.unet import make_unet
from ldm.formats.single import text
from ldm.formats.single.families import kind_of, placed
from ldm.formats.single.place import grouped, to_file
from ldm.formats.single.readers import refused
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


IMAGEN = {
    "unet.block_out_channels=[192,384,576,768]": 371_605_830,  # IF-I-M
    "unet.block_out_channels=[320,640,960,1280]": 935_365_830,  # IF-I-L
    "": 4_304_695_110,  # IF-I-XL
}


@pytest.mark.parametrize("override", IMAGEN)
def test_parameters_of_imagen_s_base(override):
    file = ROOT / "configs" / "imagen" / "64.yaml"
    model = build(load(TrainConfig, file, [override] if override else []), [], meta=True)
    found = {part: parameters(network) for part, network in model.networks.items()}
    assert found == {"unet": IMAGEN[override], "text_encoder": T5_XXL}


@pytest.mark.parametrize("side", [256, 1024])
def test_parameters_of_imagen_s_efficient_u_nets(side):
    model = build(load(TrainConfig, ROOT / "configs" / "imagen" / f"{side}.yaml"), [], meta=True)
    assert parameters(model.network) == 813_980_806
    assert model.network.config.in_channels == 6 and model.aside is not None


UNCLIP = {
    "decoder": {
        "unet": 870_173_124,  # of Stable unCLIP
        "text_encoder": CLIP_H,
        "vae": 83_653_863,
        "image_encoder": 632_076_800,  # OpenCLIP's ViT-H/14
        "image_normalizer": 2048,
    },
    "prior": {
        "prior": 1_022_030_080,  # of Karlo
        "text_encoder": 123_650_304,
        "image_encoder": 303_966_208,  # CLIP's ViT-L/14
    },
}


@pytest.mark.parametrize("name", UNCLIP)
def test_parameters_of_unclip(name):
    config = load(TrainConfig, ROOT / "configs" / "unclip" / f"{name}.yaml")
    model = build(config, [], meta=True)
    found = {part: parameters(network) for part, network in model.networks.items()}
    assert found == UNCLIP[name] and list(found)[0] == next(iter(UNCLIP[name]))


def test_parameters_of_karlo_s_decoder():
    """By the decoder/config.json of kakaobrain/karlo-v1-alpha. No family has it: Stable unCLIP's
    folders have no place for it, and the pipeline that opens Karlo's is deprecated in diffusers.
    """
    shape = UNetShape(
        block_out_channels=(320, 640, 960, 1280), layers_per_block=3, attention_head_dim=64,
        scale_shift=True,
    )  # fmt: skip
    with torch.device("meta"):
        network = make_unet(
            shape,
            3,
            1536,
            64,
            learned_variance=True,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            class_embed_type="identity",
        )
    assert parameters(network) == 885_439_686


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
    check_names(name, model)
    if published is not None:
        with torch.device("meta"):
            stock = UNet2DConditionModel(**published)
        assert shapes(model.networks["unet"]) == shapes(stock)
        same = {key: model.networks["unet"].config[key] for key in published}
        assert same == {**published, "sample_size": 128}


LAYER_23 = [
    f"transformer.resblocks.23.{layer}"
    for stem in ("ln_1.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.", "attn.out_proj.", "attn.in_proj_")
    for layer in (f"{stem}weight", f"{stem}bias")
]
NAMES: dict[str, tuple[int, list[str], str]] = {
    "stable_diffusion_1": (
        1131,
        ["cond_stage_model.transformer." + text.IDS],
        "f9768d974dc68129cbc216032b141c9ddb5e72202ab8ca3311610c35e4396303",
    ),
    "stable_diffusion_2": (
        1228,
        [f"cond_stage_model.model.{n}" for n in ("logit_scale", "text_projection", *LAYER_23)],
        "da29509e249ff00def9827743218901c6cb14be40a4f08221a1400a9660a3dc9",
    ),
    "sdxl": (
        2515,
        [
            "conditioner.embedders.0.transformer." + text.IDS,
            "conditioner.embedders.1.model.logit_scale",
        ],
        "d005e41d8aaf62de7dd70a04c6882dfbb14995220adc90d83ef06f857b9e8e34",
    ),
    "sdxl_refiner": (
        1858,
        ["conditioner.embedders.0.model.logit_scale"],
        "f68a282ffab6afe9889ad017665ab99ca6cb6f4f0292d07424d94607a0769e1e",
    ),
}
"""Of the published files: how many tensors their networks have, which of them no folder holds, and
the SHA-256 of their names, sorted, one a line."""
TRANSFORMERS = {"sd3": 491, "flux_dev": 780}
"""How many tensors the published files of these have."""


SCHEDULERS: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
)


def check_names(name: str, model: Any) -> None:
    """The names in a file are the published ones, and stock makes the networks of them again."""
    networks = model.networks
    configs = {
        part: network.config if isinstance(network.config, dict) else network.config.to_dict()
        for part, network in networks.items()
    }
    kind = kind_of({part: type(network).__name__ for part, network in networks.items()}, configs)
    file: dict[str, torch.Tensor] = {}
    for part, network in networks.items():
        own = {n: v for n, v in network.state_dict().items() if n != text.TIED[0]}
        if part.startswith("text") and "T5" not in type(network).__name__:
            own = {text.in_files(n): v for n, v in own.items()}
        place = placed(kind, part, configs[part])
        assert sum(map(len, grouped(own, place).values())) == len(own)
        file |= to_file(own, place)
    assert not any(key.startswith("ldm.") for key in file)
    told, words = {**configs, "scheduler": SCHEDULERS[kind.name[:3] == "sd3"]}, [{"a</w>": 320}]
    if kind.name == "flux":
        told["scheduler"] = SCHEDULERS[True]
    assert refused(kind, told, words) is None
    assert "(a token a</w> 320): this has a</w> 5" in (refused(kind, told, [{"a</w>": 5}]) or "")
    other = told | {"vae": configs["vae"] | {"layers_per_block": 1}}
    assert "open 2 layers a level in it: this has 1" in (refused(kind, other, words) or "")
    if name in NAMES:
        count, beside, digest = NAMES[name]
        every = sorted([*file, *beside])
        assert len(every) == count
        assert hashlib.sha256("\n".join(every).encode()).hexdigest() == digest
    if name in TRANSFORMERS:
        assert sum(key.startswith("model.diffusion_model.") for key in file) == TRANSFORMERS[name]
    convert = {
        "unet": stock_files.convert_ldm_unet_checkpoint,
        "vae": stock_files.convert_ldm_vae_checkpoint,
        "sd3": stock_files.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux": stock_files.convert_flux_transformer_checkpoint_to_diffusers,
    }
    for part in ("unet", "transformer", "vae"):
        if part in networks:
            prefix = kind.parts[part].prefixes[0]
            mine = {key: value for key, value in file.items() if key.startswith(prefix)}
            made = convert[kind.name if part == "transformer" else part](mine, config=configs[part])
            assert {n: v.shape for n, v in made.items()} == shapes(networks[part])
