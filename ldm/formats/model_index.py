"""``model_index.json`` as stock pipelines know it."""

from __future__ import annotations

from typing import Any

_OF_PIXELS = {"DDIMScheduler": "DDIMPipeline", "DDPMScheduler": "DDPMPipeline"}


def stock_index(index: dict[str, Any]) -> dict[str, Any]:
    """``index`` under the name, and with the keys, of the stock pipeline that runs the folder.

    With text in latent space that is ``StableDiffusionPipeline``; without both, ``DDIMPipeline`` or
    ``DDPMPipeline`` after the scheduler. For others, which keep their name, there is none: not of
    classes or other processes in pixel space, nor of one of text and latents without the other.
    """
    latents, text = (index[part][0] is not None for part in ("vae", "text_encoder"))
    if latents and text:
        return {key: value for key, value in index.items() if key != "classes"} | {
            "_class_name": "StableDiffusionPipeline"
        }
    if latents or text or index["classes"]:
        return index
    name = _OF_PIXELS.get(index["scheduler"][1], index["_class_name"])
    kept = ["_diffusers_version", "unet", "scheduler"]
    return {"_class_name": name, **{key: index[key] for key in kept}}
