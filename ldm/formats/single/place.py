"""How a tensor of a file is made of the tensors of a network, and taken apart again.

A place says where one tensor of a network goes, so one table serves both directions: writing puts
tensors at their places, reading takes those of the names and shapes that a network asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "transposed", "convolution", "swapped"]
"""What a file holds of a tensor: itself; its transpose; a linear layer as a convolution of 1 x 1;
the halves of its first axis in the other order."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a network lies in a file.

    Args:
        name: of the tensor of the file.
        number: which one it is of those that lie there one behind another, along their first axis.
        form: of it.
    """

    name: str
    number: int = 0
    form: Form = "same"

    def under(self, prefix: str) -> Place:
        """The same with ``prefix`` before its name."""
        return Place(prefix + self.name, self.number, self.form)


Placing = Callable[[str], Place | None]
"""Name of a tensor of a network -> its place; None: the layout has none for it."""


def grouped(names: Iterable[str], place: Callable[[str], Place]) -> dict[str, list[str]]:
    """``names`` by the tensor of the file in which they lie, in the order that they lie there."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place(name).name, []).append(name)
    return {key: sorted(mine, key=lambda name: place(name).number) for key, mine in found.items()}


def to_file(tensors: Mapping[str, Tensor], place: Callable[[str], Place]) -> dict[str, Tensor]:
    """Tensors of a file, of those of a network."""
    found = {}
    for key, names in grouped(tensors, place).items():
        parts = [_formed(tensors[name], place(name).form) for name in names]
        found[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found


def from_file(
    shapes: Mapping[str, torch.Size],
    place: Callable[[str], Place],
    read: Callable[[str], Tensor | None],
) -> dict[str, Tensor]:
    """Tensors of a network, out of those of a file.

    Args:
        shapes: of the tensors that the network asks for, by their names.
        place: where they lie.
        read: a tensor of the file, None if there is none of that name.

    Raises:
        ValueError: the file lacks one, or it has another shape; the message is one line.
    """
    found: dict[str, Tensor] = {}
    for key, names in grouped(shapes, place).items():
        whole = read(key)
        if whole is None:
            raise ValueError(f"it lacks {key}")
        forms = [place(name).form for name in names]
        asked = [_shape(shapes[name], form) for name, form in zip(names, forms, strict=True)]
        rows = (
            [shape[0] for shape in asked] if len(names) > 1 else [len(whole)] if whole.ndim else []
        )
        expected = (sum(rows), *asked[0][1:]) if len(names) > 1 else asked[0]
        if tuple(whole.shape) != expected and not _flat_kernel(whole, expected):
            raise ValueError(f"{key} is {tuple(whole.shape)}, and by its config {expected}")
        whole = whole.reshape(expected)
        pieces = whole.split(rows) if len(names) > 1 else [whole]
        for name, piece, form in zip(names, pieces, forms, strict=True):
            found[name] = _unformed(piece, form).contiguous()
    return found


def _formed(value: Tensor, form: Form) -> Tensor:
    if form == "transposed":
        return value.T
    if form == "convolution" and value.ndim == 2:
        return value[:, :, None, None]
    if form == "swapped":
        return torch.cat(value.chunk(2)[::-1])
    return value


def _unformed(value: Tensor, form: Form) -> Tensor:
    if form == "transposed":
        return value.T
    if form == "convolution" and value.ndim == 4:
        return value[:, :, 0, 0]
    if form == "swapped":
        return torch.cat(value.chunk(2)[::-1])
    return value


def _shape(shape: torch.Size, form: Form) -> tuple[int, ...]:
    if form == "transposed":
        return tuple(shape[::-1])
    if form == "convolution" and len(shape) == 2:
        return (*shape, 1, 1)
    return tuple(shape)


def _flat_kernel(value: Tensor, expected: tuple[int, ...]) -> bool:
    """Whether it is a layer that some files hold as a convolution of 1 x 1, and some as a linear
    one.
    """
    shape = tuple(value.shape)
    return shape == (*expected, 1, 1) or (*shape, 1, 1) == expected
