"""Micro-batches on the device that computes; on a GPU each is copied while the one before it is
computed.

    tensors  ->  one pinned buffer  -- one copy, on a stream of its own -->  views of one buffer

Tensors that are copied one by one from pageable memory would each make the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

_ALIGNED = 256  # bytes: what kernels take for the beginning of a tensor
Batch: TypeAlias = dict[str, Tensor]


class _Place(NamedTuple):
    start: int
    dtype: torch.dtype
    shape: torch.Size


class Lane(Protocol):
    """A way to a device."""

    def room(self, size: int) -> Tensor:
        """A buffer of ``size`` bytes on the host, uint8."""
        ...

    def send(self, buffer: Tensor) -> Callable[[], Tensor]:
        """Begins to copy ``buffer``; returns what hands out the copy to those who compute with it,
        without making the host wait.
        """
        ...


class CudaLane:
    """Pinned memory, and a stream beside that which computes.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def room(self, size: int) -> Tensor:
        """Pinned; PyTorch gives it to nobody else before it is copied."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, buffer: Tensor) -> Callable[[], Tensor]:
        """See ``Lane``."""
        with torch.cuda.stream(self.stream):
            there = buffer.to(self.device, non_blocking=True)
            copied = self.stream.record_event()

        def arrived() -> Tensor:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            there.record_stream(computing)
            return there

        return arrived


def transferred(
    batches: Iterable[Batch], device: torch.device, lane: Lane | None = None
) -> Iterator[tuple[Batch, Batch]]:
    """Each of ``batches`` as it is and on ``device``. On a GPU, or where there is a ``lane``, the
    next one is read and under way by then.
    """
    if lane is None and device.type == "cuda":
        lane = CudaLane(device)
    if lane is None:
        for batch in batches:
            yield batch, {name: value.to(device) for name, value in batch.items()}
        return
    waiting: tuple[Batch, Callable[[], Batch]] | None = None
    for batch in batches:
        following = batch, _sent(batch, lane)
        if waiting is not None:
            yield waiting[0], waiting[1]()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1]()


def _sent(batch: Mapping[str, Tensor], lane: Lane) -> Callable[[], Batch]:
    """What hands out ``batch`` where ``lane`` leads."""
    places, size = dict[str, _Place](), 0
    for name, value in batch.items():
        places[name] = _Place(size, value.dtype, value.shape)
        size += -(-value.nbytes // _ALIGNED) * _ALIGNED
    buffer = lane.room(size)
    for name, value in _views(buffer, places).items():
        value.copy_(batch[name])
    arrived = lane.send(buffer)
    return lambda: _views(arrived(), places)


def _views(buffer: Tensor, places: Mapping[str, _Place]) -> Batch:
    """The tensors whose bytes lie in ``buffer``."""
    found = dict[str, Tensor]()
    for name, (start, dtype, shape) in places.items():
        part = buffer[start : start + math.prod(shape) * dtype.itemsize]
        found[name] = part.view(dtype).view(shape)
    return found
