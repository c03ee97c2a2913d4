"""Sample pictures that several processes draw together."""

from types import SimpleNamespace
from typing import Any

import torch

import tiny
from ldm.evaluation import sheets

PROMPTS = ["one", "two", "three", "four", "five", "six", "seven"]


def drawn(monkeypatch, rank: int, world: int) -> list[torch.Tensor]:
    """By one of them."""
    monkeypatch.setattr(sheets, "gather_object", lambda mine: mine)
    processes: Any = SimpleNamespace(process_index=rank, num_processes=world)
    pipe = tiny.pipeline()
    settings = dict(num_inference_steps=2, height=tiny.SIZE, width=tiny.SIZE)
    return sheets.drawn(pipe, PROMPTS, processes, what="tests", seed=5, batch=2, **settings)


def test_pictures_are_the_same_by_any_number_of_processes(monkeypatch):
    alone = drawn(monkeypatch, 0, 1)
    assert len(alone) == 7 and alone[0].shape == (3, tiny.SIZE, tiny.SIZE)
    assert min(picture.min() for picture in alone) >= -1
    assert all(not torch.equal(alone[0], other) for other in alone[1:])
    first, second = (drawn(monkeypatch, rank, 2) for rank in (0, 1))
    together = [*first[:2], *second[:2], *first[2:], second[2]]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert [len(drawn(monkeypatch, rank, 5)) for rank in range(5)] == [2, 2, 2, 1, 0]
