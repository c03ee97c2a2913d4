"""Several LoRAs as one, and the LoRA between two models.

    sum_i w_i (alpha_i / r_i) B_i A_i = [w_i (alpha_i / r_i) B_i ...] [A_i ...]   of rank sum_i r_i
    W' - W ~ U_r U_r^T (W' - W)    the nearest of rank r (Eckart and Young 1936)

U_r are the r first left singular vectors, here eigenvectors of the smaller Gram matrix in float64:
nothing is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.formats import integrity
from ldm.formats.lora import Lora
from ldm.formats.lora_names import NETWORKS, PARTS, in_network
from ldm.formats.recognised import INDEX, told
from ldm.models.lora import Update

_NO_LAYER = re.compile(r"embeddings\.|pos_embed\.|class_embedding\.weight")
"""Tensors of two axes that no linear layer has."""


def merged(loras: Sequence[tuple[Lora, float]], rank: int | None = None) -> tuple[Lora, float]:
    """One LoRA that does what several do together.

    Args:
        loras: each with its weight, 1 being as trained.
        rank: at most; None: the sum of theirs, which loses nothing.

    Returns:
        The LoRA, and its error: the share of the update's Frobenius norm that is lost.

    Raises:
        ValueError: one has magnitudes (DoRA), which do not add up, or two are for different layers.
    """
    found: dict[str, dict[str, Update]] = {}
    lost = total = 0.0
    for part in PARTS:
        names = {name: None for lora, _ in loras for name in lora.get(part, {})}
        for name in names:
            mine = [(lora[part][name], w) for lora, w in loras if name in lora.get(part, {})]
            if any(update.magnitude is not None for update, _ in mine):
                raise ValueError(f"{part}.{name} has DoRA's magnitudes, which do not add up")
            if len({update.shape for update, _ in mine}) > 1:
                shapes = " and ".join(str(update.shape) for update, _ in mine)
                raise ValueError(f"{part}.{name} is {shapes}: the LoRAs are of different models")
            down = torch.cat([update.down.float() for update, _ in mine])
            scaled = [u.up.float() * (w * u.alpha / u.rank) for u, w in mine]
            up = torch.cat(scaled, 1)
            if rank is not None and len(down) > rank:
                whole = up.flatten(1).double() @ down.flatten(1).double()
                up, down, away = _nearest(whole, rank, down.shape)
                lost, total = lost + away, total + whole.square().sum().item()
            elif rank is not None:
                gram = up.flatten(1).T.double() @ up.flatten(1).double()
                total += (gram * (down.flatten(1) @ down.flatten(1).T).double()).sum().item()
            found.setdefault(part, {})[name] = Update(down, up, float(len(down)))
    return found, (lost / total) ** 0.5 if total else 0.0


def extracted(base: Path, tuned: Path, rank: int) -> tuple[Lora, float]:
    """The LoRA that makes ``tuned`` of ``base``, both pipeline folders, as nearly as its rank lets
    it; biases and norms, of which a LoRA has none, stay those of ``base``.

    Returns:
        The LoRA, and its error: the share of the Frobenius norm of all differences, those of biases
        and norms among them, that it does not have.

    Raises:
        OSError: a file is missing.
        ValueError: the folders are damaged, of different shapes, or do not differ.
    """
    lost = total = 0.0
    found: dict[str, dict[str, Update]] = {}
    networks = [_networks(folder) for folder in (base, tuned)]
    for part in networks[0].keys() & networks[1].keys():
        before, after = (_tensors(folder / part) for folder in (base, tuned))
        if before.keys() != after.keys():
            other = sorted(before.keys() ^ after.keys())[0]
            raise ValueError(f"{part}.{other} is in one of {base} and {tuned} alone")
        for key, value in after.items():
            if value.shape != before[key].shape:
                shapes = f"{tuple(before[key].shape)} and {tuple(value.shape)}"
                raise ValueError(f"{part}.{key} is {shapes}: the two are of different shapes")
            change = value.double() - before[key].double()
            size = change.square().sum().item()
            if size == 0:
                continue
            total += size
            name = key.removesuffix(".weight")
            if name == key or change.ndim not in (2, 4) or _NO_LAYER.search(key):
                lost += size
                continue
            up, down, away = _nearest(change.flatten(1), rank, change.shape)
            lost += away
            update = Update(down, up, float(len(down)))
            found.setdefault(part, {})[in_network(part, name)] = update
    if not found:
        raise ValueError(f"no layer of {tuned} differs from that of {base}")
    return {part: found[part] for part in PARTS if part in found}, (lost / total) ** 0.5


def halved(lora: Lora) -> Lora:
    """``lora`` in float16, which half the bytes hold; ``ValueError`` if a number is too large."""

    def half(name: str, value: Tensor) -> Tensor:
        found = value.half()
        if not bool((found.isfinite() == value.isfinite()).all()):
            raise ValueError(f"{name} holds numbers that float16 does not: leave out --half")
        return found

    def one(name: str, update: Update) -> Update:
        magnitude = None if update.magnitude is None else half(name, update.magnitude)
        return Update(half(name, update.down), half(name, update.up), update.alpha, magnitude)

    return {
        part: {name: one(f"{part}.{name}", update) for name, update in modules.items()}
        for part, modules in lora.items()
    }


def _networks(folder: Path) -> dict[str, str]:
    """Classes of the networks that a LoRA may have updates of."""
    if wrong := told(folder):
        raise OSError(wrong)
    index = integrity.json_object(folder / INDEX)
    kept = {p: index[p][1] for p in PARTS if integrity.is_part(index.get(p))}
    return {p: cls for p, cls in kept.items() if p in NETWORKS or cls.startswith("CLIP")}


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    files = integrity.weights(folder)
    if files is None:
        raise OSError(f"{folder} holds no weights: copy or download it again")
    return {name: value for file in files for name, value in load_file(file).items()}


def _nearest(matrix: Tensor, rank: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """B and A of the product of ``rank`` that is nearest to ``matrix``, and the square of how far
    it is.

    Args:
        matrix: ``out in``, float64, the kernel of a convolution among ``in``.
        rank: of the product, where the matrix has as much.
        shape: of the weight, or of A; ``. in [k k]``.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    rank = min(rank, len(values))
    basis = vectors[:, -rank:].flip(1)
    up, down = (basis, basis.T @ matrix) if wide else (matrix @ basis, basis.T)
    away = values[:-rank].clamp(min=0).sum().item() if rank < len(values) else 0.0
    down = down.reshape(-1, *shape[1:])
    up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
    return up.float().contiguous(), down.float().contiguous(), away
