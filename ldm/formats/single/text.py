"""Where the tensors of text encoders lie: under transformers' names, or open_clip's."""

from __future__ import annotations

import re

from ldm.formats.open_clip import MODULES, NAMES
from ldm.formats.single.place import Place

TOWER = "text_model."
"""What tensors of a CLIP begin with in files; a network may have them without."""
IDS = "text_model.embeddings.position_ids"
"""0, 1, ...: published files of CLIP-L hold it, and no network of today."""
TIED = ("encoder.embed_tokens.weight", "shared.weight")
"""The same tensor of a T5 under two names, of which folders hold the second."""

_PROJECTION = "text_projection.weight"
_THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
_INSIDE = {ours: theirs for theirs, ours in MODULES.items()}
_LAYER = re.compile(r"(encoder\.layers\.\d+)\.(.+)\.(weight|bias)")


def in_files(name: str) -> str:
    """The name that a tensor of a CLIP has in files."""
    beside = name.startswith((TOWER, "text_projection"))
    return name if beside else TOWER + name


def clip(name: str) -> Place:
    """The place of a tensor of a CLIP whose names are those of transformers."""
    return Place(in_files(name))


def t5(name: str) -> Place:
    """The place of a tensor of a T5."""
    return Place(name)


def open_clip(name: str) -> Place | None:
    """The place of a tensor of a CLIP whose names are those of open_clip."""
    if name == _PROJECTION:
        return Place("text_projection", form="transposed")
    name = name.removeprefix(TOWER)
    if name in _THEIRS:
        return Place(_THEIRS[name])
    if (found := _LAYER.fullmatch(name)) is None:
        return None
    block = f"transformer.resblocks.{found[1].rpartition('.')[2]}"
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", found[2]):
        return Place(f"{block}.attn.in_proj_{found[3]}", "qkv".index(fused[1]))
    inside = _INSIDE.get(found[2])
    return None if inside is None else Place(f"{block}.{inside}.{found[3]}")
