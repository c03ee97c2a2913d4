"""Where the tensors of an autoencoder lie.

    encoder.down_blocks.LEVEL.resnets.LAYER    encoder.down.LEVEL.block.LAYER
    decoder.up_blocks.LEVEL.resnets.LAYER      decoder.up.(LAST - LEVEL).block.LAYER
    mid_block.resnets.0, .attentions.0, .resnets.1    mid.block_1, .attn_1, .block_2

Levels of the decoder are counted from the widest picture, and its attention is of convolutions of
1 x 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm.formats.single.place import Place, Placing

_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # Of older folders.
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def placing(config: Mapping[str, Any]) -> Placing:
    """That of an ``AutoencoderKL``, by its config."""
    last = len(config["up_block_types"]) - 1

    def place(name: str) -> Place | None:
        stem, _, ending = name.rpartition(".")
        if stem in ("quant_conv", "post_quant_conv"):
            return Place(name)
        if ends := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)", stem):
            return Place(f"{ends[1]}.{ends[2].replace('conv_norm', 'norm')}.{ending}")
        if level := _LEVEL.fullmatch(stem):
            number = last - int(level[3]) if level[2] == "up" else int(level[3])
            inside = _inside(level[4])
            theirs = f"{level[1]}.{level[2]}.{number}.{inside}.{ending}"
            return None if inside is None else Place(theirs)
        if (middle := _MIDDLE.fullmatch(stem)) is None:
            return None
        if middle[2] == "resnets":
            return Place(f"{middle[1]}.mid.block_{int(middle[3]) + 1}.{_short(middle[4])}.{ending}")
        layer = _ATTENTION.get(middle[4])
        if layer is None or middle[3] != "0":
            return None
        form = "convolution" if ending == "weight" and layer != "norm" else "same"
        return Place(f"{middle[1]}.mid.attn_1.{layer}.{ending}", form=form)

    return place


def _inside(name: str) -> str | None:
    """The rest of a name behind its level."""
    if scaled := re.fullmatch(r"(down|up)samplers\.0\.conv", name):
        return f"{scaled[1]}sample.conv"
    block = re.fullmatch(r"resnets\.(\d+)\.(.+)", name)
    return None if block is None else f"block.{block[1]}.{_short(block[2])}"


def _short(layer: str) -> str:
    return "nin_shortcut" if layer == "conv_shortcut" else layer
