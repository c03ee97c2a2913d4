"""Fields that AUTOMATIC1111's clients send with every call and that nothing here does: which values
of them ask for nothing, and LoRAs that a prompt names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

_LORA = re.compile(r"\s*<lora:([^:<>]{1,200})(?::([^:<>]*))?>")

_SWITCHED = {
    "enable_hr": (False,),
    "restore_faces": (False,),
    "tiling": (False,),
    "script_name": ("",),
    "refiner_checkpoint": ("", "None"),
    "force_task_id": ("",),
    "infotext": ("",),
    "include_init_images": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "eta": (1.0,),
    "s_churn": (0.0,),
    "s_tmin": (0.0,),
    "s_tmax": (0.0,),
    "s_noise": (1.0,),
    "s_min_uncond": (0.0,),
    "styles": ([],),
    "script_args": ([],),
    "comments": ({},),
    "latent_mask": (),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1.0,),
    "mask_round": (True,),
}
"""Values that ask for nothing, beside null."""

_IDLE = {
    "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y",
    "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt",
    "refiner_switch_at", "override_settings_restore_afterwards", "do_not_save_samples",
    "do_not_save_grid", "mask_blur_x", "mask_blur_y",
}  # fmt: skip
"""How something would be done that is not asked for, whatever they say."""

_OF_TEXT = {"denoising_strength"}
"""The same where there is no picture to set out from."""


def refuse(sent: Mapping[str, Any], *, image: bool) -> None:
    """``ValueError`` where fields that nothing reads ask for something.

    Args:
        sent: fields and values.
        image: whether there is a picture to set out from.
    """
    for name, value in sent.items():
        if value is None or name in _IDLE or (name in _OF_TEXT and not image):
            continue
        if name == "alwayson_scripts":
            if isinstance(value, dict) and not any(map(_args, value.values())):
                continue
            raise ValueError("alwayson_scripts: there are no scripts here: leave it out")
        if name not in _SWITCHED:
            raise ValueError(f"{name[:60]}: there is no such field here")
        if not any(_same(value, idle) for idle in _SWITCHED[name]):
            usual = " or ".join(map(repr, _SWITCHED[name])) or "null"
            raise ValueError(f"{name}: this cannot be done here: leave it out, or send {usual}")


def _args(script: Any) -> bool:
    """Whether a script of ``alwayson_scripts`` asks for anything."""
    args = script.get("args", []) if isinstance(script, dict) else [script]
    return args not in ([], [False])


def _same(value: Any, idle: Any) -> bool:
    """Whether both are the same, True being no number."""
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)


def lora_words(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its <lora:NAME:WEIGHT>, and these.

    Raises:
        ValueError: a weight is no number.
    """
    found = []
    for name, told in _LORA.findall(prompt):
        try:
            weight = float(told) if told else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"<lora:{name}:...>: the weight must be a number")
        found.append((name, weight))
    return _LORA.sub("", prompt).strip() if found else prompt, found
