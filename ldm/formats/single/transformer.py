"""Where the tensors of the transformers of Stable Diffusion 3 and of Flux lie.

    transformer_blocks.N.attn.to_q, to_k, to_v    joint_blocks.N.x_block.attn.qkv, side by side
                              .add_q_proj, ...    joint_blocks.N.context_block.attn.qkv
    single_transformer_blocks.N.attn.to_q, to_k, to_v, proj_mlp    single_blocks.N.linear1

Where diffusers' last modulations say (scale, shift), the files say (shift, scale).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm.formats.single.place import Place, Placing

_QKV = {
    **{f"attn.to_{part}": ("attn.qkv", n) for n, part in enumerate("qkv")},
    **{f"attn2.to_{part}": ("attn2.qkv", n) for n, part in enumerate("qkv")},
}
_ADDED = {f"attn.add_{part}_proj": ("attn.qkv", n) for n, part in enumerate("qkv")}
_MLP = "linear_1", "linear_2"


def _embedders(names: Mapping[str, tuple[str, str, str]]) -> dict[str, str]:
    """Two layers of each of diffusers' embedders by theirs."""
    return {
        f"time_text_embed.{ours}.{layer}": f"{stem}.{inside}"
        for ours, (stem, *theirs) in names.items()
        for layer, inside in zip(_MLP, theirs, strict=True)
    }


_SD3 = _embedders(
    {
        "timestep_embedder": ("t_embedder.mlp", "0", "2"),
        "text_embedder": ("y_embedder.mlp", "0", "2"),
    }
) | {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_SD3_PICTURE = {
    "norm1.linear": "adaLN_modulation.1",
    "attn.norm_q": "attn.ln_q",
    "attn.norm_k": "attn.ln_k",
    "attn.to_out.0": "attn.proj",
    "attn2.norm_q": "attn2.ln_q",
    "attn2.norm_k": "attn2.ln_k",
    "attn2.to_out.0": "attn2.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_SD3_TEXT = {
    "norm1_context.linear": "adaLN_modulation.1",
    "attn.norm_added_q": "attn.ln_q",
    "attn.norm_added_k": "attn.ln_k",
    "attn.to_add_out": "attn.proj",
    "ff_context.net.0.proj": "mlp.fc1",
    "ff_context.net.2": "mlp.fc2",
}
SD3_LAYERS = (
    *_SD3,
    "norm_out.linear",
    *(
        f"transformer_blocks.0.{layer}"
        for layer in (*_QKV, *_ADDED, *_SD3_PICTURE, *_SD3_TEXT)
        if ".norm_" not in layer
    ),
)
"""Layers with a matrix of an ``SD3Transformer2DModel``, of its blocks the first one's."""
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def sd3(config: Mapping[str, Any]) -> Placing:
    """That of an ``SD3Transformer2DModel``, by its config."""
    last = config["num_layers"] - 1

    def place(name: str) -> Place | None:
        if name == "pos_embed.pos_embed":
            return Place("pos_embed")
        stem, _, ending = name.rpartition(".")
        if stem == "norm_out.linear":
            return Place(f"final_layer.adaLN_modulation.1.{ending}", form="swapped")
        if stem in _SD3:
            return Place(f"{_SD3[stem]}.{ending}")
        if (block := _BLOCK.fullmatch(stem)) is None:
            return None
        layer, root = block[3], f"joint_blocks.{block[2]}"
        # Of the last block the texts are read alone, which has a modulation of two and not of six.
        swapped = layer == "norm1_context.linear" and int(block[2]) == last
        for stream, fused, names in (
            ("x_block", _QKV, _SD3_PICTURE),
            ("context_block", _ADDED, _SD3_TEXT),
        ):
            if layer in fused:
                inside, number = fused[layer]
                return Place(f"{root}.{stream}.{inside}.{ending}", number)
            if layer in names:
                form = "swapped" if swapped else "same"
                return Place(f"{root}.{stream}.{names[layer]}.{ending}", form=form)
        return None

    return place


_FLUX = _embedders(
    {
        "timestep_embedder": ("time_in", "in_layer", "out_layer"),
        "text_embedder": ("vector_in", "in_layer", "out_layer"),
        "guidance_embedder": ("guidance_in", "in_layer", "out_layer"),
    }
) | {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    **{f"attn.to_{part}": "img_attn.qkv" for part in "qkv"},
    **{f"attn.add_{part}_proj": "txt_attn.qkv" for part in "qkv"},
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_FLUX_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_FLUX_FUSED = {**{f"attn.to_{part}": n for n, part in enumerate("qkv")}, "proj_mlp": 3}


def flux(config: Mapping[str, Any]) -> Placing:
    """That of a ``FluxTransformer2DModel``."""

    def place(name: str) -> Place | None:
        stem, _, ending = name.rpartition(".")
        if stem == "norm_out.linear":
            return Place(f"final_layer.adaLN_modulation.1.{ending}", form="swapped")
        if stem in _FLUX:
            return Place(f"{_FLUX[stem]}.{ending}")
        if (block := _BLOCK.fullmatch(stem)) is None:
            return None
        layer, single = block[3], bool(block[1])
        root = f"{'single' if single else 'double'}_blocks.{block[2]}"
        norms = _FLUX_SINGLE_NORMS if single else _FLUX_NORMS
        if layer in norms:
            return Place(f"{root}.{norms[layer]}.scale")
        if single and layer in _FLUX_FUSED:
            return Place(f"{root}.linear1.{ending}", _FLUX_FUSED[layer])
        inside = (_FLUX_SINGLE if single else _FLUX_DOUBLE).get(layer)
        number = (_QKV | _ADDED).get(layer, ("", 0))[1]
        return None if inside is None else Place(f"{root}.{inside}.{ending}", number)

    return place
