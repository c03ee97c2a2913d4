"""The full-size configs have the published number of parameters, to the parameter."""

import pytest

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.families.parts import build, parameters
from runs import ROOT


@pytest.mark.parametrize(
    ("name", "unet", "text_encoder"),
    [
        ("stable_diffusion_1", 859_520_964, 123_060_480),
        ("stable_diffusion_2", 865_910_724, 340_387_840),
    ],
)
def test_parameters_of_the_published_models(name, unet, text_encoder):
    config = load(TrainConfig, ROOT / "configs" / f"{name}.yaml")
    parts = build(config, [], meta=True)
    assert parameters(parts.unet) == unet
    assert parameters(parts.text_encoder) == text_encoder
    assert parameters(parts.vae) == 83_653_863
    assert all(p.is_meta for p in parts.unet.parameters())
