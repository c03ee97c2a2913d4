"""What the file of a LoRA says about its training, as sd-scripts writes it and A1111 and ComfyUI
show it.

    ss_*            network, base, data and settings (kohya's sd-scripts)
    modelspec.*     title, architecture, prediction, resolution, words of the prompt (1.0.0)

Only what the run knows is there: no date, so that the same run is the same file, and no path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.loader import images
from ldm.config.schema import TrainConfig
from ldm.families.model import Model
from ldm.families.reads import learns
from ldm.models.lora import collect

_SD = (320, 640, 1280, 1280)
_UNETS = {  # by width of the text and of the levels
    (768, _SD): ("sd_v1", "stable-diffusion-v1"),
    (1024, _SD): ("sd_v2", "stable-diffusion-v2-512"),
    (2048, _SD[:3]): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
_FLUX = (19, 38, 24)  # blocks of both kinds, heads
_OTHER = (None, "ldm")  # as in a single file whose shape nobody has published


def told(config: TrainConfig, model: Model, pictures: int | None) -> dict[str, str]:
    """The metadata of the LoRA of a run, whose adapters are in ``model``.

    Args:
        config: the run.
        model: what it trains.
        pictures: how many it trains on, None: nobody knows.
    """
    predicts = model.scheduler_config().get("prediction_type")
    v = predicts == "v_prediction"
    version, architecture = base_of(model.network.config)
    if version == "sd_v2" and v:
        version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    name, side = Path(config.run).name, config.images.size
    updates = [u for part in learns(config, model) for u in collect(model.networks[part]).values()]
    trigger = None if config.lora is None else config.lora.trigger
    found = {
        "ss_base_model_version": version,
        "ss_v2": None if version is None else str(version.startswith("sd_v2")),
        "ss_output_name": name,
        "ss_network_dim": _only({update.rank for update in updates}),
        "ss_network_alpha": _only({update.alpha for update in updates}),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": pictures,
        "ss_total_batch_size": config.batch_size,
        "ss_max_train_steps": images(config.duration, config.batch_size, pictures)
        // config.batch_size,
        "ss_learning_rate": config.optimizer.lr,
        "ss_seed": config.seed,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if v else "epsilon" if predicts == "epsilon" else None,
        "modelspec.trigger_phrase": trigger,
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def base_of(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """sd-scripts' version and ModelSpec's architecture of the model whose network has ``config``.

    The version is None where nobody has published the shape.
    """
    width, levels = config.get("cross_attention_dim"), config.get("block_out_channels")
    if isinstance(width, int) and levels is not None:
        return _UNETS.get((width, tuple(levels)), _OTHER)
    blocks = ("num_layers", "num_single_layers", "num_attention_heads")
    if tuple(config.get(key) for key in blocks) == _FLUX:
        return "flux1", "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"
    return _OTHER


def _only(every: set[Any]) -> Any:
    """The one that all are, or the word that sd-scripts has for several."""
    return f"{next(iter(every)):g}" if len(every) == 1 else "Dynamic"
