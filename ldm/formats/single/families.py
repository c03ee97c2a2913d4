"""Which networks a file holds, and under which names.

The prefixes are those of the files that were published: Stable Diffusion 1.5, 2.1, XL base and
refiner, 3 and 3.5, and of Flux.1 as ComfyUI packs it. The file of Flux.1's transformer alone, as it
was published, has no prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.formats.single import text, transformer, unet, vae
from ldm.formats.single.place import Place, Placing

Configs = Mapping[str, Mapping[str, Any]]
"""``config.json`` of every network, and ``scheduler_config.json``, by part."""


@dataclass(frozen=True)
class Part:
    """A network in a file.

    Args:
        placing: by its config, where its tensors lie below a prefix.
        prefixes: the first is written, the others are read as well.
    """

    placing: Callable[[Mapping[str, Any]], Placing]
    prefixes: tuple[str, ...]


def _always(place: Placing) -> Callable[[Mapping[str, Any]], Placing]:
    return lambda config: place


_CLIP, _OPEN_CLIP, _T5 = _always(text.clip), _always(text.open_clip), _always(text.t5)
_NETWORK = "model.diffusion_model."
_UNET = Part(unet.placing, (_NETWORK,))
_VAE = Part(vae.placing, ("first_stage_model.", "vae."))
_PACKED_CLIP = Part(_CLIP, ("text_encoders.clip_l.transformer.",))
_PACKED_T5 = Part(_T5, ("text_encoders.t5xxl.transformer.",))


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        name: of ``--family``.
        architecture: of the header, as ModelSpec has it.
        parts: the networks that it holds.
        sign: what the name of a tensor matches that no kind before it in ``KINDS`` has.
        readers: who opens it.
    """

    name: str
    architecture: str
    parts: Mapping[str, Part]
    sign: re.Pattern[str]
    readers: str = "ComfyUI and A1111"


KINDS = (
    Kind(
        "sd3",
        "stable-diffusion-3",
        {
            "transformer": Part(transformer.sd3, (_NETWORK, "")),
            "vae": _VAE,
            "text_encoder": _PACKED_CLIP,
            "text_encoder_2": Part(_CLIP, ("text_encoders.clip_g.transformer.",)),
            "text_encoder_3": _PACKED_T5,
        },
        re.compile(r"(model\.diffusion_model\.)?joint_blocks\."),
    ),
    Kind(
        "flux",
        "flux-1",
        {
            "transformer": Part(transformer.flux, (_NETWORK, "")),
            "vae": Part(vae.placing, ("vae.", "first_stage_model.")),
            "text_encoder": _PACKED_CLIP,
            "text_encoder_2": _PACKED_T5,
        },
        re.compile(r"(model\.diffusion_model\.)?double_blocks\."),
        "ComfyUI and Forge",
    ),
    Kind(
        "sdxl",
        "stable-diffusion-xl-v1-base",
        {
            "unet": _UNET,
            "vae": _VAE,
            "text_encoder": Part(_CLIP, ("conditioner.embedders.0.transformer.",)),
            "text_encoder_2": Part(_OPEN_CLIP, ("conditioner.embedders.1.model.",)),
        },
        re.compile(r"conditioner\.embedders\.1\."),
    ),
    Kind(
        "sdxl-refiner",
        "stable-diffusion-xl-v1-refiner",
        {
            "unet": _UNET,
            "vae": _VAE,
            "text_encoder_2": Part(_OPEN_CLIP, ("conditioner.embedders.0.model.",)),
        },
        re.compile(r"conditioner\.embedders\.0\.model\."),
    ),
    Kind(
        "sd2",
        "stable-diffusion-v2",
        {
            "unet": _UNET,
            "vae": _VAE,
            "text_encoder": Part(_OPEN_CLIP, ("cond_stage_model.model.",)),
        },
        re.compile(r"cond_stage_model\.model\."),
    ),
    Kind(
        "sd1",
        "stable-diffusion-v1",
        {
            "unet": _UNET,
            "vae": _VAE,
            "text_encoder": Part(_CLIP, ("cond_stage_model.transformer.",)),
        },
        re.compile(r"model\.diffusion_model\.input_blocks\."),
    ),
)
"""The first whose sign a file has is its own."""
OWN = "ldm."
"""What the names begin with of tensors for which a layout has none."""
NONE = Kind("none", "ldm", {}, re.compile(re.escape(OWN)), "this library alone")
"""What has no published layout: all names begin with ``OWN``."""
ALONE = {
    "vae": Kind(
        "vae",
        "autoencoder",
        {"vae": Part(vae.placing, ("first_stage_model.", "vae.", ""))},
        re.compile(r"(first_stage_model\.|vae\.)?decoder\."),
    )
}
"""Files of one network, by its part."""


def own(part: str, name: str) -> str:
    """The name of a tensor that the layout of a file has none for."""
    return f"{OWN}{part}.{name}"


def kind_in(names: Iterable[str]) -> Kind | None:
    """The kind of a file with tensors of these names; None: it is no whole model."""
    names = list(names)
    return next((k for k in (*KINDS, NONE) if any(map(k.sign.match, names))), None)


def kind_of(classes: Mapping[str, str], configs: Configs) -> Kind:
    """The kind of file that a pipeline folder becomes.

    Args:
        classes: of its networks, by part.
        configs: of them.
    """
    kinds = {kind.name: kind for kind in KINDS}
    predicts = classes.get("transformer") or classes.get("unet")
    if predicts == "SD3Transformer2DModel":
        return kinds["sd3"]
    if predicts == "FluxTransformer2DModel":
        return kinds["flux"]
    if predicts != "UNet2DConditionModel" or classes.get("vae", "AutoencoderKL") != "AutoencoderKL":
        return NONE
    if "text_encoder_2" in classes:
        return kinds["sdxl" if "text_encoder" in classes else "sdxl-refiner"]
    # What tells the U-Nets of 1 and 2 apart, in ComfyUI too.
    return kinds["sd2" if configs["unet"].get("use_linear_projection") else "sd1"]


def placed(
    kind: Kind, part: str, config: Mapping[str, Any], number: int = 0
) -> Callable[[str], Place]:
    """Where the tensors of a network lie, under the prefix of this ``number``."""
    entry = kind.parts.get(part)
    if entry is None:
        return lambda name: Place(own(part, name))
    place, prefix = entry.placing(config), entry.prefixes[number]

    def whole(name: str) -> Place:
        found = place(name)
        return Place(own(part, name)) if found is None else found.under(prefix)

    return whole
