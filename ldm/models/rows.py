"""Rows of a batch that do not know each other: what a network says of one is the same to the bit
alone and in company.

A matrix product of few rows is summed in another order than one of many. In a U-Net that touches
the linear layers that read one vector a row, those of the time embedding, and a batch of one row;
what reads pictures or tokens has many rows in any batch. So the former read row by row, each row
twice, as in a batch of two (of equal neighbours the first alone), and a lone row is evaluated
twice. The pictures that are drawn so are those of a batch of one guided picture, whose two rows are
a batch of two; and of one that is not guided where its row is evaluated twice there as well
(``paired``).

That holds up to ``MOST_ROWS`` where it was measured, a CPU with AVX2 and float32; of another device
nobody knows it before it is asked (``alike``).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ldm.diffusion import Condition, Denoiser

MOST_ROWS = 8
"""Rows of a batch up to which they do not know each other; convolutions do from 16 on."""


def separate(network: nn.Module) -> None:
    """Lets the linear layers of ``network`` read vectors row by row, from here on and in all of
    its calls; layers that were added since are separated when it is called again.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_by_rows, module)


def _by_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.ndim != 2:
        return linear(x, layer.weight, layer.bias)
    rows, found = x.split(1), list[Tensor]()
    for n, row in enumerate(rows):
        # The two rows of a guided picture are at one timestep. Asking a GPU would wait for it.
        if n and x.device.type == "cpu" and torch.equal(row, rows[n - 1]):
            found.append(found[-1])
        else:
            found.append(linear(row.expand(2, -1), layer.weight, layer.bias)[:1])
    return torch.cat(found)


def evaluated(
    denoiser: Denoiser, x_t: Tensor, timestep: Tensor, cond: Condition, *, least: int = 2
) -> Tensor:
    """What ``denoiser`` says of ``b`` rows, in a batch of ``least`` of them or more: the last is
    evaluated as often as that takes.

    Args:
        denoiser: whose rows do not know each other.
        x_t: ``b c h w``.
        timestep: ``b``.
        cond: of as many.
        least: 2, or where rows of batches of different sizes do know each other a constant size.
    """
    missing = least - len(x_t)
    if missing <= 0:
        return denoiser(x_t, timestep, cond)

    def filled(part: Tensor) -> Tensor:
        return torch.cat([part, *[part[-1:]] * missing])

    return denoiser(filled(x_t), filled(timestep), cond.map(filled))[: len(x_t)]


def paired(denoiser: Denoiser) -> Denoiser:
    """``denoiser``, with a lone row evaluated twice: what it says of one picture alone is then what
    it says of it in any company of rows that do not know each other.
    """

    def ask(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return evaluated(denoiser, x_t, timestep.expand(len(x_t)), cond)

    return ask


def alike(
    denoiser: Denoiser, x_t: Tensor, timestep: Tensor, cond: Condition, *, least: int = 2
) -> bool:
    """Whether each of ``b`` rows is the same to the bit alone, in pairs and with all others.

    Args:
        denoiser: that is asked.
        x_t: ``b c h w``.
        timestep: ``b``, of different ones.
        cond: of as many.
        least: as ``evaluated`` has it.
    """

    def rows(first: int, last: int) -> Tensor:
        part = slice(first, last)
        few = cond.map(lambda told: told[part])
        return evaluated(denoiser, x_t[part], timestep[part], few, least=least)

    many = len(x_t)
    every = rows(0, many)
    pairs = torch.cat([rows(n, min(n + 2, many)) for n in range(0, many, 2)])
    lone = torch.cat([rows(0, 1), rows(many - 1, many)])
    return torch.equal(every, pairs) and torch.equal(every[[0, -1]], lone)
