"""Names of modules in LoRA files, and in the networks.

    network      text_encoder: encoder.layers.0.mlp.fc1   text_encoder_2: text_model.encoder. ...
    diffusers    text_encoder.text_model.encoder.layers.0.mlp.fc1
    kohya        lora_te_text_model_encoder_layers_0_mlp_fc1

Since transformers 5.6 a text encoder without a projection has no ``text_model.``; one with, the
second of SDXL and both of SD3, still has, and files have it always. In kohya's every ``.`` is an
``_``. Beside a second text encoder, ``lora_te2_``, the first one is ``lora_te1_``, and the U-Net's
modules have the names of ``ldm.formats.sgm``; those of diffusers are read there as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ldm.formats import sgm
from ldm.models.wrapped import bare

T = TypeVar("T")

UNET, TRANSFORMER, FIRST, SECOND = PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The networks that a LoRA may have updates of, as pipelines call them."""
NETWORKS = (UNET, TRANSFORMER)
"""Those of them that predict."""

_KOHYA = {"lora_unet_": UNET, "lora_te_": FIRST, "lora_te1_": FIRST, "lora_te2_": SECOND}
_TOWER = "text_model."
_PROJECTION = "text_projection"
# In kohya's names "_" is also what stands for ".": these are the words that have one of their own.
_WORDS = re.compile(
    "conv_norm_out|conv_shortcut|conv_in|conv_out|proj_in|proj_out|time_emb_proj|time_embedding"
    "|add_embedding|linear_1|linear_2|down_blocks|mid_block|up_blocks|transformer_blocks|to_q|to_k"
    "|to_v|to_out|text_model|text_projection|self_attn|q_proj|k_proj|v_proj|out_proj|[a-z0-9]+"
)
_LYCORIS = {
    re.compile(pattern): kind
    for pattern, kind in {
        "hada_": "LoHa",
        "lokr_": "LoKr",
        "oft_": "OFT",
        "on_input$": "IA3",
        r"[ab][12]\.weight$": "GLoRA",
        r"(diff|diff_b)$": "full difference",
        "(w|b)_norm$": "norm",
    }.items()
}
# Layers that no U-Net of Stable Diffusion 1 or 2 has.
_SDXL = re.compile(r".+\.transformer_blocks\.[1-9].*|add_embedding\..+")


def in_network(part: str, name: str) -> str:
    """The name that the module of a file has in its network, of Stable Diffusion 1, 2 or XL where
    it is a text encoder (``as_in`` of others).
    """
    if part in NETWORKS:
        return name
    name = name.removeprefix(_TOWER)
    return _TOWER + name if part == SECOND and not name.startswith(_PROJECTION) else name


def in_file(part: str, name: str) -> str:
    """The name that the module of a network has in files."""
    if part in NETWORKS or name.startswith(_PROJECTION):
        return name
    return _TOWER + name.removeprefix(_TOWER)


def as_in(networks: Mapping[str, Any], read: Mapping[str, Mapping[str, T]]) -> dict[str, Any]:
    """``read``, by part and module of a file, under the names that modules have in ``networks``."""

    def called(part: str, name: str) -> str:
        if part in NETWORKS or name.startswith(_PROJECTION):
            return name
        inner = name.removeprefix(_TOWER)
        return _TOWER + inner if hasattr(bare(networks.get(part)), "text_model") else inner

    return {
        part: {called(part, name): value for name, value in modules.items()}
        for part, modules in read.items()
    }


def from_kohya(
    stems: Iterable[str], unet: Mapping[str, Any] | None = None
) -> dict[str, tuple[str, str]]:
    """Part and module of kohya's names.

    Args:
        stems: the names; what begins otherwise is left out.
        unet: config of the U-Net that they are of, by default SDXL's base or refiner where they are
            sgm's.

    Raises:
        ValueError: sgm's name of a layer that the U-Net does not have.
    """
    parted: dict[str, tuple[str, str]] = {}
    for stem in stems:
        prefix = next((p for p in _KOHYA if stem.startswith(p)), None)
        if prefix is not None:
            parted[stem] = _KOHYA[prefix], stem.removeprefix(prefix)
    foreign = [rest for part, rest in parted.values() if part == UNET and sgm.is_one(rest)]
    ours = _renamed(foreign, unet, sgm.Layout.from_sgm)
    return {
        stem: (part, in_network(part, _dotted(ours.get(rest, rest))))
        for stem, (part, rest) in parted.items()
    }


def to_kohya(
    modules: Mapping[str, Iterable[str]],
    unet: Mapping[str, Any] | None = None,
    family: str | None = None,
) -> dict[tuple[str, str], str]:
    """Names of kohya's by part and module, but for those of a transformer.

    Args:
        modules: names in the networks, by part.
        unet: config of the U-Net that they are of. Without it they are of SDXL, base or refiner, if
            there are some of a second text encoder, or of layers that only SDXL has.
        family: of a transformer.

    Raises:
        ValueError: a module has no name there, or one that means another module.
    """
    of_sd3 = family == "sd3"
    if TRANSFORMER in modules and not of_sd3:
        raise ValueError(
            "a LoRA of a transformer is written in kohya's format for Stable Diffusion 3 alone: if"
            " it is of that, say so (ldm lora --family sd3)"
        )
    layers = list(modules.get(UNET, ()))
    if of_sd3 and layers:
        raise ValueError("this is a LoRA of a U-Net, which Stable Diffusion 3 has none of")
    if unet is None:
        of_sdxl = SECOND in modules or any(map(_SDXL.fullmatch, layers))
    else:
        of_sdxl = unet.get("addition_embed_type") == "text_time"
    theirs = _renamed(layers, unet, sgm.Layout.to_sgm) if of_sdxl else {}
    prefixes = {UNET: "lora_unet_", FIRST: "lora_te1_" if of_sdxl or of_sd3 else "lora_te_"}
    found = {}
    for part, names in modules.items():
        for name in names if part != TRANSFORMER else ():
            if _dotted(name.replace(".", "_")) != name:
                raise ValueError(f"{part}.{name} could not be read back from kohya's format")
            called = theirs[name] if of_sdxl and part == UNET else in_file(part, name)
            found[part, name] = (prefixes.get(part, "lora_te2_") + called).replace(".", "_")
    return found


def kind_of(names: Iterable[str]) -> str | None:
    """What kind of LyCORIS a file with tensors of these names is; None: none, a LoRA maybe."""
    endings = {name.partition(".")[2] for name in names if name.startswith(tuple(_KOHYA))}
    return next((kind for sign, kind in _LYCORIS.items() if any(map(sign.match, endings))), None)


def _renamed(
    names: Iterable[str],
    unet: Mapping[str, Any] | None,
    rename: Callable[[sgm.Layout, str], str | None],
) -> dict[str, str]:
    """Other names of a U-Net's layers, in the first layout that has all of them."""
    names, wrong = list(names), ""
    for layout in sgm.PUBLISHED if unet is None else [sgm.Layout.of(unet)]:
        found = {name: other for name in names if (other := rename(layout, name)) is not None}
        if len(found) == len(names):
            return found
        wrong = wrong or next(name for name in names if name not in found)
    one = "Stable Diffusion XL has no U-Net with" if unet is None else "this U-Net does not have"
    raise ValueError(f"{one} a layer {wrong}")


def _dotted(stem: str) -> str:
    return ".".join(_WORDS.findall(stem))
