"""Blocks of a network that are compiled where they are (``torch.compile``, regional).

The residual and transformer blocks repeat, so that each shape is compiled once, in a minute and not
in ten, and what lies between them stays as it is. Names of parameters do not change, nor what is
saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from ldm.models.wrapped import bare

Asked = Literal["auto", "blocks", "off"]
WORTH = 3000
"""Steps from which on ``auto`` compiles: a minute or two, against tenths of a second a step."""
BACKEND = "inductor"
_RESIDUAL = "ResnetBlock2D"  # which diffusers does not name among what repeats


def chosen(asked: Asked, device: torch.device, steps: int, *, shapes: bool) -> bool:
    """Whether blocks are compiled.

    Args:
        asked: ``compile`` of the config.
        device: where the run computes.
        steps: of the run.
        shapes: whether its pictures are of several shapes, for each of which all is compiled anew.
    """
    if asked != "auto":
        return asked == "blocks"
    return device.type == "cuda" and steps >= WORTH and not shapes


def compile_blocks(network: nn.Module) -> int:
    """Compiles the blocks of ``network`` in place, each when it is first called; returns how many
    there are.
    """
    inner = bare(network)
    named = getattr(inner, "_repeated_blocks", None) or getattr(inner, "_no_split_modules", None)
    names = {*(named or ()), _RESIDUAL}
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    # Eight variants of one class by default: behind them it would run as if not compiled.
    import torch._dynamo as dynamo  # takes seconds, which who does not compile saves

    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo.config, limit, max(getattr(dynamo.config, limit), 8 * len(blocks)))
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=False)
    return len(blocks)


def channels_last(network: nn.Module, kind: str) -> None:
    """Lets kernels of convolutions lie in memory as the fastest ones of a GPU read them, where an
    optimiser of that ``kind`` leaves them so.
    """
    if kind in ("adamw", "lion"):
        network.to(memory_format=torch.channels_last)


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Inside, compiled blocks of ``network`` run as they were written: drawing and measuring call
    them with shapes of their own, for which compiling would take longer than it saves.
    """
    if all(module._compiled_call_impl is None for module in network.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
