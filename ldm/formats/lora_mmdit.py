"""LoRAs of Stable Diffusion 3 under the names that Stability's own code has for its layers.

    lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight   .lora_up.weight   .alpha
    diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight   .lora_B.weight
    lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight ...

sd-scripts writes the first, ComfyUI the second, and the third, of diffusers' names, OneTrainer.
Queries, keys and values are one layer in the first two:

    an update of rank r       down ``r in``, up ``3 out r``: each of the three has all of ``down``
    three updates of rank r   down ``3 r in``, up ``3 out 3 r``, three blocks on its diagonal and
                              zeros, alpha three times as large

so that nothing is lost from one to the other (of an alpha that float32 knows), and what was read is
written again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm.formats.single.place import Place
from ldm.formats.single.transformer import SD3_LAYERS, sd3
from ldm.models.lora import Update, Updates

KINDS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha",
    "dora_scale": "magnitude",
}  # fmt: skip
"""What the tensors of a layer are called in kohya's files, and here."""
_ENDINGS = KINDS | {"lora_A.weight": "down", "lora_B.weight": "up"}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _ENDINGS))})")
_KOHYA, _ONE_TRAINER = "lora_unet_", "lora_transformer_"
_STARTS = (_KOHYA, _ONE_TRAINER, "model.diffusion_model.", "diffusion_model.", "transformer.")
_BLOCK = re.compile(r"(joint|transformer)_blocks_(\d+)_")
_MODULATION = "norm1_context.linear"


def is_one(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is one of those."""
    mine = [name for name in names if name.startswith(_STARTS)]
    if any(re.search(r"joint_blocks[._]", name) for name in mine):
        return True
    stems = [name.partition(".")[0] for name in mine]
    return bool(mine) and all(
        stem.startswith(_ONE_TRAINER) and _numbered(stem.removeprefix(_ONE_TRAINER))[0] in _ours()
        for stem in stems
    )


def layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """What updates are made of (``down``, ``up``, and perhaps ``alpha`` and ``magnitude``), by the
    names of a transformer's layers in diffusers, and the tensors of other networks.

    Raises:
        ValueError: a tensor is of no layer that is known here, or has another shape.
    """
    found: dict[str, dict[str, Any]] = {}
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        start = next((start for start in _STARTS if key.startswith(start)), None)
        if start is None:
            others[key] = value
            continue
        match = _KEY.fullmatch(key)
        stem = "" if match is None else match[1].removeprefix(start).replace(".", "_")
        if match is None or _numbered(stem)[0] not in _theirs().keys() | _ours().keys():
            raise ValueError(f"{key} is of no LoRA for the transformer of Stable Diffusion 3")
        kind = _ENDINGS[match[2]]
        if (kind == "alpha") != (value.ndim < 2 and value.numel() == 1):
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, which no {kind} has")
        piece = found.setdefault(stem, {})
        if kind in piece:
            raise ValueError(f"{key} is there under another name as well")
        piece[kind] = float(value) if kind == "alpha" else value
    made: dict[str, dict[str, Any]] = {}
    for stem, piece in found.items():
        if missing := [k for k in ("down", "up") if k not in piece]:
            raise ValueError(f"{stem} lacks its {missing[0]} weight")
        for name, part in _apart(stem, piece).items():
            if name in made:
                raise ValueError(f"{name} is there under another name as well")
            made[name] = part
    return made, others


def stems(updates: Updates) -> dict[str, Update]:
    """Updates by kohya's names, of those by the names of a transformer's layers in diffusers.

    Raises:
        ValueError: a layer has no name there, or queries, keys and values have no updates of one
            kind, rank and alpha.
    """
    found: dict[str, dict[int, Update]] = {}
    for name, update in updates.items():
        stem, number = _numbered(name.replace(".", "_"))
        if stem not in _ours():
            raise ValueError(f"transformer.{name} has no name in kohya's files of Stable Diffusion")
        _, place = _ours()[stem]
        update = _turned(update) if _is_turned(name, place, update.shape) else update
        found.setdefault(_KOHYA + _with(_stem(place), number), {})[place.number] = update
    return {stem: _together(stem, parts) for stem, parts in found.items()}


@cache
def _ours() -> dict[str, tuple[str, Place]]:
    """Layers with their places, of block 0, by their names in diffusers with ``_`` for ``.``."""
    table, place_of = {}, sd3({"num_layers": 0})  # so that block 0 is not the last one
    for name in SD3_LAYERS:
        place = place_of(f"{name}.weight")
        assert place is not None
        table[name.replace(".", "_")] = (name, place)
    return table


@cache
def _theirs() -> dict[str, list[tuple[str, Place]]]:
    """The same by the names of what they lie in, in order."""
    table: dict[str, list[tuple[str, Place]]] = {}
    for name, place in sorted(_ours().values(), key=lambda entry: entry[1].number):
        table.setdefault(_stem(place), []).append((name, place))
    return table


def _stem(place: Place) -> str:
    return place.name.removesuffix(".weight").replace(".", "_")


def _numbered(stem: str) -> tuple[str, str | None]:
    """``stem`` as that of block 0, and the number of its block."""
    match = _BLOCK.match(stem)
    if match is None:
        return stem, None
    return f"{match[1]}_blocks_0_{stem[match.end() :]}", match[2]


def _with(name: str, number: str | None) -> str:
    """``name``, of block 0, in the block ``number``."""
    return name if number is None else re.sub(r"(?<=blocks[._])0", number, name, count=1)


def _apart(stem: str, piece: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers that ``stem`` is, with their parts of ``piece``."""
    known, number = _numbered(stem)
    theirs = known in _theirs()
    every = _theirs()[known] if theirs else [_ours()[known]]
    if "magnitude" in piece:
        flat = piece["up"].ndim == 2
        piece["magnitude"] = piece["magnitude"].reshape((-1,) if flat else (1, -1, 1, 1))
    pieces = [piece]
    if len(every) > 1:
        pieces = _thirds(stem, piece)
    made = {}
    for (name, place), part in zip(every, pieces, strict=True):
        shape = (len(part["up"]), *part["down"].shape[1:])
        if theirs and _is_turned(name, place, shape):
            part = part | {k: _halves(part[k]) for k in ("up", "magnitude") if k in part}
        made[_with(name, number)] = part
    return made


def _is_turned(name: str, place: Place, shape: tuple[int, ...]) -> bool:
    """Whether the halves of a layer's outputs are in the other order there: of the output's
    modulation, and of that of the texts in the last block, which is of two parts and not of six.
    """
    return place.form == "swapped" or (name.endswith(_MODULATION) and shape[0] == 2 * shape[1])


def _halves(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])


def _turned(update: Update) -> Update:
    magnitude = update.magnitude
    turned = None if magnitude is None else _halves(magnitude)
    return Update(update.down, _halves(update.up), update.alpha, turned)


def _blocks(up: Tensor) -> Tensor:
    """``3 o 3 r`` of ``3 o 3 r``: blocks of rows and of columns."""
    return up.unflatten(1, (3, -1)).unflatten(0, (3, -1))


def _is_three(up: Tensor) -> bool:
    """Whether only the three blocks on the diagonal are something."""
    if up.shape[1] % 3 or not up.any():
        return False
    blocks = _blocks(up)
    return not any(blocks[i, :, j].any() for i in range(3) for j in range(3) if i != j)


def _thirds(stem: str, piece: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parts of queries, keys and values."""
    down, up = piece["down"], piece["up"]
    if down.ndim != 2 or up.ndim != 2 or len(up) % 3 or up.shape[1] != len(down):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ValueError(f"{stem}: {shapes} are no update of queries, keys and values")
    alpha, rows = piece.get("alpha", float(len(down))), up.chunk(3)
    if _is_three(up):
        blocks = _blocks(up)
        parts = [
            {"down": a, "up": blocks[k, :, k].contiguous(), "alpha": alpha / 3}
            for k, a in enumerate(down.chunk(3))
        ]
    else:
        parts = [{"down": down.clone(), "up": row, "alpha": alpha} for row in rows]
    if "magnitude" in piece:
        for part, magnitude in zip(parts, piece["magnitude"].chunk(3), strict=True):
            part["magnitude"] = magnitude
    return parts


def _together(stem: str, parts: Mapping[int, Update]) -> Update:
    """One update of those that lie one behind another."""
    if not stem.endswith("_qkv"):
        return parts[0]
    three = [parts[n] for n in sorted(parts)]
    kinds = {(u.down.shape, u.up.shape, u.alpha, u.magnitude is None) for u in three}
    if len(three) != 3 or len(kinds) != 1:
        raise ValueError(
            f"{stem}: kohya's format has queries, keys and values as one, and here they have no"
            " updates of one rank and alpha: keep this LoRA in diffusers' format"
        )
    magnitude = None
    if three[0].magnitude is not None:
        magnitude = torch.cat([u.magnitude for u in three if u.magnitude is not None])
    first, up = three[0], torch.cat([u.up for u in three])
    if all(torch.equal(first.down, u.down) for u in three) and not _is_three(up):
        return Update(first.down, up, first.alpha, magnitude)
    down, up = torch.cat([u.down for u in three]), torch.block_diag(*(u.up for u in three))
    return Update(down, up, 3 * first.alpha, magnitude)
