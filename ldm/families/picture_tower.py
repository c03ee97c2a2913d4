"""The picture tower of a run: from a folder, or new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.config.schema import TrainConfig
from ldm.config.shapes import VisionShape
from ldm.errors import ConfigError
from ldm.families.networks import described, in_model, initialised, on_meta, read
from ldm.models.embedding import PICTURE_TOWER, PictureTower

PROCESSOR = "feature_extractor"
_FILE = "preprocessor_config.json"


def make_picture_tower(config: TrainConfig, *, meta: bool = False) -> PictureTower:
    """That which ``config.image_encoder`` describes or names, else that of ``config.model``;
    float32.

    Raises:
        ConfigError: it is described nowhere or cannot be read.
    """
    asked = config.image_encoder
    if isinstance(asked, VisionShape):
        with described(PICTURE_TOWER):
            shape = CLIPVisionConfig(
                hidden_size=asked.hidden_size,
                intermediate_size=asked.intermediate_size,
                num_hidden_layers=asked.layers,
                num_attention_heads=asked.heads,
                patch_size=asked.patch_size,
                image_size=asked.image_size,
                hidden_act=asked.activation,
                projection_dim=asked.projection,
            )
            if meta:
                network = on_meta(lambda: CLIPVisionModelWithProjection(shape))
            else:
                with initialised(config.seed, PICTURE_TOWER):
                    network = CLIPVisionModelWithProjection(shape)
            return PictureTower(network, _usual(asked.image_size))
    folder = in_model(config.model, PICTURE_TOWER, PICTURE_TOWER) if asked is None else Path(asked)
    if (folder / PICTURE_TOWER).is_dir():
        folder /= PICTURE_TOWER
    network = read(CLIPVisionModelWithProjection, folder, PICTURE_TOWER, meta)
    if (channels := network.config.num_channels) != 3:
        raise ConfigError(f"{PICTURE_TOWER}: {folder} sees {channels} channels, and no pictures")
    for place in (folder, folder.parent / PROCESSOR):
        if (place / _FILE).is_file():
            with described(PICTURE_TOWER):
                return PictureTower(network, CLIPImageProcessorPil.from_pretrained(place))
    return PictureTower(network, _usual(network.config.image_size))


def _usual(side: int) -> Any:
    """CLIP's own, for squares of ``side``."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
