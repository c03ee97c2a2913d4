"""The YAML that A1111 reads beside a file of Stable Diffusion 1 or 2 (``NAME.yaml``), in place of
that of the published model: it says what the U-Net predicts, and its shape.

Its keys are those of the config that was published with Stable Diffusion (CompVis, 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ldm.formats.single.families import Configs, Kind
from ldm.formats.single.header import resolution

_V = "v_prediction"
_MODULES = "ldm.modules.diffusionmodules."
_ENCODERS = "ldm.modules.encoders.modules."


def text(kind: Kind, configs: Configs) -> str:
    """The YAML of a model of ``kind``, sd1 or sd2."""
    unet, vae, scheduler = configs["unet"], configs["vae"], configs["scheduler"]
    predicts = "v" if scheduler.get("prediction_type") == _V else "eps"
    parameters = {
        "parameterization": predicts,
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "num_timesteps_cond": 1,
        "timesteps": scheduler["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["sample_size"],
        "channels": vae["latent_channels"],
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": vae["scaling_factor"],
        "use_ema": False,
        "unet_config": _target(_MODULES + "openaimodel.UNetModel", _unet(kind, unet)),
        "first_stage_config": _target("ldm.models.autoencoder.AutoencoderKL", _vae(vae, configs)),
        "cond_stage_config": _encoder(kind),
    }
    tree = {"model": _target("ldm.models.diffusion.ddpm.LatentDiffusion", parameters)}
    return yaml.safe_dump(tree, sort_keys=False)


def predicts_v(written: str) -> bool:
    """Whether the YAML beside a file says that the U-Net predicts v.

    Raises:
        ValueError: it is none.
    """
    try:
        tree = yaml.safe_load(written)
        return tree["model"]["params"].get("parameterization") == "v"
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"it is no config of a model ({type(error).__name__})") from None


def _target(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": name, "params": dict(parameters)}


def _unet(kind: Kind, unet: Mapping[str, Any]) -> dict[str, Any]:
    channels, kinds = unet["block_out_channels"], unet["down_block_types"]
    first = channels[0]
    linear = {"num_head_channels": 64, "use_linear_in_transformer": True}
    return {
        "image_size": 32,  # unused
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": first,
        "attention_resolutions": [2**n for n, name in enumerate(kinds) if "Attn" in name][::-1],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": [width // first for width in channels],
        **(linear if kind.name == "sd2" else {"num_heads": 8}),
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }


def _vae(vae: Mapping[str, Any], configs: Configs) -> dict[str, Any]:
    channels = vae["block_out_channels"]
    shape = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": resolution(configs),
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": vae["latent_channels"], "ddconfig": shape, "lossconfig": loss}


def _encoder(kind: Kind) -> dict[str, Any]:
    if kind.name == "sd2":
        return _target(
            _ENCODERS + "FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"}
        )
    return {"target": _ENCODERS + "FrozenCLIPEmbedder"}
