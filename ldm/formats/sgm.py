"""Names of a U-Net's layers in Stability's own code (sgm), and in diffusers.

sgm numbers all blocks on the way down, and all on the way up, where diffusers counts levels and
layers of a level (input_blocks: 0 is conv_in, the last of every level but the lowest goes down):

    input_blocks.N.0    down_blocks.LEVEL.resnets.LAYER, or .downsamplers.0
    input_blocks.N.1    down_blocks.LEVEL.attentions.LAYER
    middle_block.0, 1, 2    mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.N.0, 1, 2    up_blocks.LEVEL.resnets.LAYER, .attentions.LAYER, .upsamplers.0

An upsampler comes right after what its level has. kohya's LoRA files of SDXL have these names, and
whole models in one file (``ldm.formats.single``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# What follows the name of an attention is the same in both.
_INSIDE = re.compile(r"(?:norm|proj_in|proj_out|transformer_blocks[._]\d+[._].+)")
_OURS = re.compile(r"((?:down|up)_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+)\.(.+)")
_THEIRS = re.compile(r"((?:input|output)_blocks_\d+_\d+|middle_block_\d+)_(.+)")
_SGM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")


def is_one(stem: str) -> bool:
    """Whether a name, every ``.`` of which is an ``_``, is one of sgm's."""
    return _SGM.match(stem) is not None


@dataclass(frozen=True)
class Layout:
    """The blocks of a U-Net.

    Args:
        layers: of each level on the way down, the widest picture first.
        attention: which of the levels have attention.
    """

    layers: tuple[int, ...]
    attention: tuple[bool, ...]

    @classmethod
    def of(cls, unet: Mapping[str, Any]) -> Layout:
        """That of the config of a ``UNet2DConditionModel``."""
        attention = tuple("Attn" in kind for kind in unet["down_block_types"])
        layers = unet["layers_per_block"]
        levels = (layers,) * len(attention) if isinstance(layers, int) else tuple(layers)
        return cls(levels, attention)

    def to_sgm(self, name: str) -> str | None:
        """The name of the layer that diffusers calls ``name``; None: there is no such layer."""
        inside = _OURS.fullmatch(name)
        if inside is None:
            return self._layers.get(name)
        block = self._attentions.get(inside[1])
        return f"{block}.{inside[2]}" if block and _INSIDE.fullmatch(inside[2]) else None

    def from_sgm(self, stem: str) -> str | None:
        """The name in diffusers of the layer that sgm calls ``stem``, in both of which every ``.``
        is an ``_``; None: there is no such layer.
        """
        if (name := _flat(self._layers).get(stem)) is not None:
            return name
        inside = _THEIRS.fullmatch(stem)
        block = _flat(self._attentions).get(inside[1]) if inside else None
        return f"{block}_{inside[2]}" if inside and block and _INSIDE.fullmatch(inside[2]) else None

    @cached_property
    def _attentions(self) -> dict[str, str]:
        """Names of the blocks by those of diffusers."""
        return {
            f"{ours}.attentions.{layer}": f"{theirs}.1"
            for ours, layer, theirs, attention in self._down() + self._up()
            if attention
        } | {"mid_block.attentions.0": "middle_block.1"}

    @cached_property
    def _layers(self) -> dict[str, str]:
        """Names of all else by those of diffusers."""
        found, levels = dict(_ENDS), len(self.layers)
        resnets = {f"{o}.resnets.{layer}": f"{t}.0" for o, layer, t, _ in self._down() + self._up()}
        resnets |= {f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)}
        for ours, theirs in resnets.items():
            found |= {f"{ours}.{name}": f"{theirs}.{inside}" for name, inside in _RESNET.items()}
        down = up = 0
        for level in range(levels - 1):
            down += self.layers[level] + 1
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down}.0.op"
            up += self.layers[levels - 1 - level] + 1
            after = 1 + self.attention[levels - 1 - level]
            theirs = f"output_blocks.{up - 1}.{after}.conv"
            found[f"up_blocks.{level}.upsamplers.0.conv"] = theirs
        return found

    def _down(self) -> list[tuple[str, int, str, bool]]:
        """Level, layer, sgm's block and whether it has attention, of the way down."""
        found, number = [], 1
        for level, layers in enumerate(self.layers):
            for layer in range(layers):
                block = f"input_blocks.{number + layer}"
                found.append((f"down_blocks.{level}", layer, block, self.attention[level]))
            number += layers + 1
        return found

    def _up(self) -> list[tuple[str, int, str, bool]]:
        """The same of the way up."""
        found, number = [], 0
        mirrored = zip(reversed(self.layers), reversed(self.attention), strict=True)
        for level, (layers, attention) in enumerate(mirrored):
            for layer in range(layers + 1):
                found.append((f"up_blocks.{level}", layer, f"output_blocks.{number}", attention))
                number += 1
        return found


def _flat(names: Mapping[str, str]) -> dict[str, str]:
    """Ours by theirs, with ``_`` for every ``.``."""
    return {theirs.replace(".", "_"): ours.replace(".", "_") for ours, theirs in names.items()}


PUBLISHED = (
    Layout((2, 2, 2), (False, True, True)),
    Layout((2, 2, 2, 2), (False, True, True, False)),
)
"""The layouts of SDXL's base and of its refiner (Podell et al. 2023, table 1; stock configs)."""
