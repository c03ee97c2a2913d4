"""Batches on their way to a device, by a lane that is none of a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.engine.transfer import transferred


class Slow:
    """Copies at the last moment, and writes down what is asked of it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def room(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def send(self, buffer: Tensor) -> Callable[[], Tensor]:
        self.told.append("sent")

        def arrived() -> Tensor:
            self.told.append("arrived")
            return buffer.clone()

        return arrived


def batch(number: int) -> dict[str, Tensor]:
    return {
        "position": torch.arange(3) + number,
        "told": torch.tensor([[True], [False], [True]]),
        "noise": torch.randn(3, 4, 5).transpose(1, 2),
        "u": torch.rand(3, dtype=torch.float64),
        "tokens": torch.randn(3, 7).bfloat16(),
        "none": torch.empty(3, 0),
    }


def test_batches_arrive_as_they_were_and_one_ahead():
    torch.manual_seed(0)
    given, lane, read = [batch(n) for n in range(3)], Slow(), []

    def reading():
        for number, one in enumerate(given):
            read.append(number)
            yield one

    found = []
    for here, there in transferred(reading(), torch.device("cpu"), lane):
        found.append((len(read), here))
        assert here is given[len(found) - 1]
        assert there.keys() == here.keys()
        for name, value in there.items():
            assert value.dtype == here[name].dtype and torch.equal(value, here[name]), name
            assert value.data_ptr() % 16 == 0 or not value.numel()
        bases = {value.untyped_storage().data_ptr() for value in there.values()}
        assert len(bases) == 1  # one copy
    assert [ahead for ahead, _ in found] == [2, 3, 3]
    assert lane.told == ["sent", "sent", "arrived", "sent", "arrived", "arrived"]
    assert list(transferred([], torch.device("cpu"), lane)) == []


def test_a_cpu_reads_none_ahead():
    """A step of a run that is stopped must find the loader where it left it."""
    read = []

    def reading():
        for number in range(2):
            read.append(number)
            yield {"x": torch.tensor([number])}

    pairs = transferred(reading(), torch.device("cpu"))
    here, there = next(pairs)
    assert read == [0] and there["x"] is here["x"]
